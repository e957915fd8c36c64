"""Efforts of sparsify_ on SmolLM2-135M: what the plan estimates, what it took, and what came out.

    python benchmarks/effort.py                  # text: prose that Python ships
    python benchmarks/effort.py --data FOLDER    # WikiText-2 and C4, see real_models.texts
    python benchmarks/effort.py --table          # the results so far as Markdown

Results go into a file of JSON lines; cells that it has are skipped. Every cell runs in a process of its
own. Seconds are wall time, as the estimate's are: other work on the machine is in both.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import Keyed, add_flags, append, measured, measured_texts, missing, print_head, table

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_flags(parser, "2:4 seconds 64", "benchmarks/results/effort.jsonl")
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()

from real_models import config_for, dense_smollm2, machine, texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import hf_sparse

WINDOW = 512


@dataclass(frozen=True)
class Cell(Keyed):
    """One line of the table."""

    zeros: str
    effort: str
    windows: int

    @property
    def name(self) -> str:
        """What `--only` takes."""
        return f"{self.zeros} {self.effort} {self.windows}"


def cells() -> Iterator[Cell]:
    """All cells, those that say most first."""
    for zeros in ("2:4", "50 %", "70 %"):
        yield Cell(zeros, "seconds", 64)
        yield Cell(zeros, "minutes", 64)
        yield Cell(zeros, "minutes", 256)
        yield Cell(zeros, "hours", 272)


def main(options: argparse.Namespace) -> None:
    """Fill the table, print it, or with --cell measure one line in this process."""
    disable_progress_bar()
    table(Cell, options, machine(), measure=measure, fill=fill, show=print_table)


def fill(options: argparse.Namespace) -> None:
    """Measure the cells that are missing."""
    todo = missing(Cell, cells(), options)
    with tempfile.TemporaryDirectory() as temporary:
        dense_smollm2(Path(temporary))
        for number, cell in enumerate(todo, 1):
            print(f"{number} of {len(todo)}: {cell.name}", flush=True)
            append(options.out, measured(cell, "--models", temporary))


def measure(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Plan, follow the plan, and measure perplexity."""
    documents, held_out = texts(options.data)
    tokenizer = AutoTokenizer.from_pretrained(options.models)
    model = AutoModelForCausalLM.from_pretrained(options.models)
    batches = hf_sparse.calibration_batches(
        tokenizer, documents, num_samples=cell.windows, window=WINDOW
    )
    plan = hf_sparse.plan_sparsify(model, config_for(cell.zeros), batches, cell.effort)
    report = hf_sparse.sparsify_(model, None, batches, plan)
    return {
        "data": "prose" if options.data is None else "WikiText-2, C4",
        "plan": str(plan),
        "estimated": plan.total_seconds,
        "seconds": report.seconds,
        "sparsity": report.sparsity,
        "notes": report.notes,
        "perplexity": {
            name: hf_sparse.perplexity(
                model, tokenizer, text, WINDOW, max_windows=options.max_windows
            )
            for name, text in held_out.items()
        },
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the results as Markdown."""
    if not (names := measured_texts(rows)):
        return
    head = ["zeros", "effort", "windows", "estimated, s", "took, s", "ratio"]
    head += [f"perplexity {name}" for name in names]
    print_head(head)
    for row in rows:
        cell = Cell(**row["cell"])
        ratio = row["seconds"] / row["estimated"]
        columns = [cell.zeros, cell.effort, str(cell.windows)]
        columns += [f"{row['estimated']:.0f}", f"{row['seconds']:.0f}", f"{ratio:.2f}"]
        columns += [f"{row['perplexity'][name]:.2f}" for name in names]
        print("| " + " | ".join(columns) + " |")


if __name__ == "__main__":
    main(options)
