"""The best sparse SmolLM2-135M for a number of tokens: pruned, recovered as a whole, and what it knows.

    python benchmarks/best_models.py --data FOLDER    # WikiText-2, C4, and zeroshot/ beside it
    python benchmarks/best_models.py --table          # the results so far as Markdown

A start is pruned by ALPS, its blocks trained with their zeros fixed, on `windows` of C4; a recovery
then trains the whole model on `tokens` of the same documents, the dense model as its teacher, the
zeros fixed. Starts and recovered models are kept in `--work`; results go into a file of JSON lines, and
cells that it has are skipped. Every cell runs in a process of its own. Seconds are the processor's.
With `--examples` so many of each zero-shot task are asked of each model, too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cells import Keyed, add_flags, append, measured, measured_texts, missing, print_head, table

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_flags(parser, "2:4 131072", "benchmarks/results/best_models.jsonl")
    parser.add_argument("--work", type=Path, default=Path("bench_output/best_models"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--examples", type=int, default=0, help="of each zero-shot task")
    options = parser.parse_args()

import torch
from real_models import config_for, dense_smollm2, machine, peak_mb, texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import hf_sparse

WINDOW = 512
HELD_OUT = 16
TASKS = ("arc_easy", "piqa", "hellaswag", "lambada_openai", "blimp")
# Not compared with others yet: the cells of 32,768 tokens change one at a time.
RECOVERY: dict[str, Any] = {"logits": 1.0, "temperature": 1.0, "hidden": 1.0, "lr": 3e-4}


@dataclass(frozen=True)
class Cell(Keyed):
    """One line of the table."""

    zeros: str
    tokens: int = 0
    recovery: dict[str, Any] = field(default_factory=dict)
    windows: int = 64
    method: str = "alps"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What `--only` takes."""
        changed = "".join(f" {key}={value}" for key, value in self.recovery.items())
        windows = f" {self.windows} windows" if self.windows != 64 else ""
        method = f" {self.method}" if self.method != "alps" else ""
        method += "" if "reconstruct" in self.options or self.zeros == "0 %" else " unreconstructed"
        return f"{self.zeros}{method}{windows}" + (
            f" {self.tokens}{changed}" if self.tokens else ""
        )

    @property
    def start(self) -> str:
        """The name of the folder of its start."""
        if self.zeros == "0 %":
            return "dense"
        short = self.zeros.replace(":", "-").replace(" %", "")
        plain = "" if "reconstruct" in self.options else "-plain"
        return f"{self.method}-{short}-{self.windows}{plain}"


def cells() -> Iterator[Cell]:
    """All cells, those that say most first."""
    yield Cell("0 %", windows=0)
    for zeros in ("2:4", "50 %", "70 %", "80 %"):
        allocation = {"allocation": "owl"} if zeros in ("70 %", "80 %") else {}
        start: dict[str, Any] = {"options": {**allocation, "reconstruct": 2}}
        yield Cell(zeros, **start)
        yield Cell(zeros, 131_072, **start)
        yield Cell(zeros, 460_800, **start)
    for zeros in ("50 %", "70 %"):  # cheaper starts
        yield Cell(zeros)
        yield Cell(zeros, 131_072)
    for changes in (
        {"lr": 1e-4},
        {"lr": 1e-3},
        {"hidden": 0.0},
        {"temperature": 2.0},
        {"logits": 0.5},
    ):
        yield Cell("2:4", 32_768, changes, options={"reconstruct": 2})
    yield Cell("2:4", 32_768, options={"reconstruct": 2})


def main(options: argparse.Namespace) -> None:
    """Fill the table, print it, or with --cell measure one line in this process."""
    disable_progress_bar()
    torch.set_num_threads(options.threads)
    table(Cell, options, machine(), measure=measure, fill=fill, show=print_table)


def fill(options: argparse.Namespace) -> None:
    """Measure the cells that are missing."""
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "dense" / "config.json").exists():
        dense_smollm2(options.work / "dense")
    todo = missing(Cell, cells(), options)
    for number, cell in enumerate(todo, 1):
        print(f"{number} of {len(todo)}: {cell.name}", flush=True)
        append(options.out, row := measured(cell))
        print(row, flush=True)


def measure(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Prune or load the start, recover it, and measure."""
    documents, held_out = texts(options.data)
    tokenizer = AutoTokenizer.from_pretrained(options.work / "dense")
    row: dict[str, Any] = {"data": "prose" if options.data is None else "WikiText-2, C4"}
    model = started(cell, tokenizer, documents, options, row)
    if cell.tokens:
        batches = hf_sparse.calibration_batches(
            tokenizer, documents, num_samples=cell.tokens // WINDOW + HELD_OUT, window=WINDOW
        )
        row["tokens"] = (len(batches) - HELD_OUT) * WINDOW
        teacher = AutoModelForCausalLM.from_pretrained(options.work / "dense")
        settings = {**RECOVERY, **cell.recovery}
        start = time.process_time()
        report = hf_sparse.recover_(model, batches, teacher=teacher, held_out=HELD_OUT, **settings)
        row["recovery_seconds"] = time.process_time() - start
        row["recovery"], row["notes"] = settings, report.notes
        del teacher
        if cell.tokens > 100_000:
            name = f"{cell.start}-{cell.tokens}" + "".join(f"-{v}" for v in cell.recovery.values())
            folder = options.work / name
            if not folder.exists():
                hf_sparse.save_pretrained(model, folder, config_for(cell.zeros))
    row["peak_mb"] = peak_mb()
    row["sparsity"] = hf_sparse.measure_sparsity(model).sparsity
    row["perplexity"] = {
        name: hf_sparse.perplexity(model, tokenizer, text, WINDOW, max_windows=options.max_windows)
        for name, text in held_out.items()
    }
    if options.examples:
        report = hf_sparse.evaluate_choices(
            model, tokenizer, TASKS, data=options.data.parent / "zeroshot", limit=options.examples
        )
        row["examples"] = options.examples
        row["zero_shot"] = {score.task: score.acc for score in report.scores}
    return row


def started(
    cell: Cell,
    tokenizer: Any,
    documents: list[str],
    options: argparse.Namespace,
    row: dict[str, Any],
) -> Any:
    """The model that a cell starts from: loaded, or pruned and kept."""
    folder = options.work / cell.start
    if (folder / "config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(options.work / "dense")
    batches = hf_sparse.calibration_batches(
        tokenizer, documents, num_samples=cell.windows, window=WINDOW
    )
    start = time.process_time()
    hf_sparse.prune_(model, config_for(cell.zeros), cell.method, batches, **cell.options)
    row["pruning_seconds"] = time.process_time() - start
    hf_sparse.save_pretrained(model, folder, config_for(cell.zeros))
    return model


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the results as Markdown."""
    if not (names := measured_texts(rows)):
        return
    head = ["zeros", "start", "recovery", *(f"perplexity {name}" for name in names)]
    head += ["zero-shot mean", "CPU s pruning", "CPU s recovery", "peak, MB"]
    print_head(head)
    for row in rows:
        cell = Cell(**row["cell"])
        extras = "".join(f", {key}={value}" for key, value in cell.options.items())
        how = "".join(f", {key}={value}" for key, value in cell.recovery.items())
        scores = row.get("zero_shot", {})
        columns = [
            cell.zeros,
            "dense" if cell.zeros == "0 %" else f"{cell.method}{extras}, {cell.windows} windows",
            f"{row['tokens']:,} tokens{how}" if cell.tokens else "-",
            *(f"{row['perplexity'][name]:.2f}" for name in names),
            f"{100 * sum(scores.values()) / len(scores):.1f}" if scores else "-",
            *(
                f"{row[name]:.0f}" if name in row else "-"
                for name in ("pruning_seconds", "recovery_seconds", "peak_mb")
            ),
        ]
        print("| " + " | ".join(columns) + " |")


if __name__ == "__main__":
    main(options)
