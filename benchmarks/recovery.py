"""Recovery of SmolLM2-135M after SparseGPT: perplexity, zeros, cost of a step, memory.

    python benchmarks/recovery.py                  # text: prose that Python ships
    python benchmarks/recovery.py --data FOLDER    # WikiText-2 and C4, see real_models.texts
    python benchmarks/recovery.py --table          # the results so far as Markdown
    python benchmarks/recovery.py --cost           # what keeping the zeros costs in a step

Results go into a file of JSON lines; cells that it has are skipped, so that a run can be stopped and
started again. Every cell runs in a process of its own, so that its peak memory (RSS) is its own. The
pruned models are kept in `--work`.

"recovered": the share of the gap in log perplexity between the pruned and the dense model that is
closed. Seconds are the processor's. `--cost` prints those of an optimizer step of one window over those
of the same step without what keeps the zeros: the hooks of the frozen mask taken off, stock LoRA
instead of masked LoRA; the least of some steps, the two taking turns.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import Keyed, add_flags, append, measured, measured_texts, missing, print_head, table

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_flags(parser, "2:4 lora", "benchmarks/results/recovery.jsonl")
    parser.add_argument("--work", type=Path, default=Path("bench_output/recovery"))
    parser.add_argument("--cost", action="store_true", help="of a step; nothing else is done")
    parser.add_argument("--tokens", type=int, default=400_000, help="to train on")
    parser.add_argument("--accumulate", type=int, default=2, help="windows in a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="steps to time of each kind")
    options = parser.parse_args()

import torch
from real_models import config_for, dense_smollm2, machine, peak_mb, texts
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.optim.zeros import sparse_layers, zeros_hash
from hf_sparse.recovery.methods import RECOVERIES, Recovery
from hf_sparse.recovery.training import train as train_

WINDOW = 512
CALIBRATION = 64
# Takes an optimizer step and returns its seconds.
Step = Callable[[], float]
NAMES = {
    "none": "none",
    "lora": "masked LoRA",
    "shira": "ShiRA",
    "finetune": "fine-tuning, frozen mask",
    "stock": "fine-tuning, nothing frozen",
}


@dataclass(frozen=True)
class Cell(Keyed):
    """One line of the table."""

    zeros: str
    method: str = "none"
    teacher: bool = False
    dtype: str = "float32"
    lr: float | None = None

    @property
    def name(self) -> str:
        """What `--only` takes."""
        parts = [self.zeros, self.method, "distilled" * self.teacher]
        parts.append(self.dtype if self.dtype != "float32" else "")
        parts.append(f"lr={self.lr}" if self.lr else "")
        return " ".join(filter(None, parts))

    @property
    def config(self) -> SparsityConfig:
        """Pattern and sparsity."""
        return config_for(self.zeros)


def cells() -> Iterator[Cell]:
    """All cells, those that say most first."""
    yield Cell("0 %")
    patterns = ("2:4", "60 %")
    for zeros in patterns:
        yield Cell(zeros)
        yield Cell(zeros, "finetune", teacher=True)
        yield Cell(zeros, "lora")
        yield Cell(zeros, "shira")
    for zeros in patterns:
        yield Cell(zeros, "finetune")
        yield Cell(zeros, "lora", teacher=True)
        yield Cell(zeros, "shira", teacher=True)
        yield Cell(zeros, "stock")
    yield Cell("2:4", "lora", dtype="bfloat16")


def main(options: argparse.Namespace) -> None:
    """Fill the table, print it, or with --cell measure one line in this process."""
    disable_progress_bar()
    torch.set_num_threads(options.threads)
    if options.cost:
        print(f"{machine()}\n")
        prepare(options, [Cell("2:4")])
        print_cost(options)
        return
    table(Cell, options, machine(), measure=measure, fill=fill, show=print_table)


def fill(options: argparse.Namespace) -> None:
    """Measure the cells that are missing."""
    todo = missing(Cell, cells(), options)
    prepare(options, todo)
    for number, cell in enumerate(todo, 1):
        print(f"{number} of {len(todo)}: {cell.name}", flush=True)
        append(options.out, measured(cell))


def prepare(options: argparse.Namespace, todo: list[Cell]) -> None:
    """Make the dense and the pruned models that these cells start from."""
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "dense" / "config.json").exists():
        dense_smollm2(options.work / "dense")
    for cell in todo:
        if cell.zeros != "0 %" and not pruned_folder(cell, options).exists():
            prune(cell, options)


def pruned_folder(cell: Cell, options: argparse.Namespace) -> Path:
    """Where the pruned model is kept."""
    text = "prose" if options.data is None else "c4"
    folder: Path = (
        options.work / f"sparsegpt-{cell.zeros.replace(':', '-').replace(' %', '')}-{text}"
    )
    return folder


def prune(cell: Cell, options: argparse.Namespace) -> None:
    """Prune the dense model by SparseGPT and save it."""
    tokenizer = AutoTokenizer.from_pretrained(options.work / "dense")
    model = AutoModelForCausalLM.from_pretrained(options.work / "dense")
    batches = hf_sparse.calibration_batches(
        tokenizer, texts(options.data)[0], num_samples=CALIBRATION, window=WINDOW
    )
    hf_sparse.prune_(model, cell.config, "sparsegpt", batches)
    hf_sparse.save_pretrained(model, pruned_folder(cell, options), cell.config)


def measure(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Recover, and measure perplexity, zeros, time and memory."""
    documents, held_out = texts(options.data)
    tokenizer = AutoTokenizer.from_pretrained(options.work / "dense")
    folder = options.work / "dense" if cell.zeros == "0 %" else pruned_folder(cell, options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, cell.dtype))
    batches = hf_sparse.calibration_batches(
        tokenizer, documents, num_samples=options.tokens // WINDOW, window=WINDOW
    )
    row: dict[str, Any] = {
        "data": "prose" if options.data is None else "WikiText-2, C4",
        "tokens": len(batches) * WINDOW,
        "max_windows": options.max_windows,
    }
    if cell.method != "none":
        before = zeros_of(model)
        row["model_mb"] = model.get_memory_footprint() / 1e6
        start = time.process_time()
        row["trained"], row["lr"] = train(cell, model, batches, options)
        row["seconds"] = time.process_time() - start
        row["peak_mb"] = peak_mb()
        row["same_zeros"] = zeros_of(model) == before
    row["sparsity"] = hf_sparse.measure_sparsity(model).sparsity
    row["perplexity"] = {
        name: hf_sparse.perplexity(model, tokenizer, text, WINDOW, max_windows=options.max_windows)
        for name, text in held_out.items()
    }
    return row


def train(
    cell: Cell, model: PreTrainedModel, batches: list[dict[str, Any]], options: argparse.Namespace
) -> tuple[str, float]:
    """Recover in place; returns the losses in words, and the learning rate."""
    lr = cell.lr or RECOVERIES.get(cell.method, RECOVERIES["finetune"]).lr
    if cell.method == "stock":
        inputs = [{**batch, "labels": batch["input_ids"]} for batch in batches]
        recovery = Recovery("finetune", lr, None, 1, options.accumulate, seed=0)
        losses = train_(recovery, model, inputs, freeze=False)
        return f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end", lr
    teacher = None
    if cell.teacher:
        teacher = AutoModelForCausalLM.from_pretrained(options.work / "dense")
    report = hf_sparse.recover_(
        model, batches, cell.method, teacher=teacher, accumulate=options.accumulate, lr=lr
    )
    return report.notes[0], lr


def zeros_of(model: PreTrainedModel) -> str:
    """A hash of the places of all zeros."""
    return zeros_hash(layer.parameter.detach() for layer in sparse_layers(model))


def print_cost(options: argparse.Namespace) -> None:
    """Print the cost of a step, with the products in several types."""
    tokenizer = AutoTokenizer.from_pretrained(options.work / "dense")
    [batch] = hf_sparse.calibration_batches(
        tokenizer, texts(options.data)[0], num_samples=1, window=WINDOW
    )
    folder = pruned_folder(Cell("2:4"), options)
    print("| 2:4 | weights | products | s | without, s | ratio |\n|---|---|---|---|---|---|")
    for what, pair, dtype, fast in (
        ("frozen mask over none", frozen_and_free, torch.float32, True),
        ("masked LoRA over stock LoRA", masked_and_stock, torch.float32, False),
        ("masked LoRA over stock LoRA", masked_and_stock, torch.float32, True),
        ("masked LoRA over stock LoRA", masked_and_stock, torch.bfloat16, False),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        runs = pair(model, {**batch, "labels": batch["input_ids"]}, fast)
        seconds: list[list[float]] = [[], []]
        for _ in range(options.steps + 1):
            for run, found in zip(runs, seconds, strict=True):
                found.append(run())
        kept, free = (min(found[1:]) for found in seconds)
        products = "bfloat16" if fast else str(dtype).removeprefix("torch.")
        columns = [what, str(dtype).removeprefix("torch."), products]
        columns += [f"{kept:.2f}", f"{free:.2f}", f"{kept / free:.3f}"]
        print("| " + " | ".join(columns) + " |", flush=True)


def frozen_and_free(model: Any, batch: dict[str, Any], fast: bool) -> tuple[Step, Step]:
    """Steps of AdamW with the zeros kept, and without."""
    # at rate 0 the steps without the mask leave the zeros for those with it
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def frozen() -> float:
        mask = hf_sparse.keep_zeros_(optimizer, model)
        seconds = timed(model, optimizer, batch, fast)
        mask.remove()
        return seconds

    return frozen, lambda: timed(model, optimizer, batch, fast)


def masked_and_stock(model: Any, batch: dict[str, Any], fast: bool) -> tuple[Step, Step]:
    """Steps of two adapters of the same sizes."""
    try:
        import peft
    except ImportError as error:
        raise SystemExit("PEFT is needed: pip install 'hf_sparse[peft]'") from error

    settings = peft.LoraConfig(r=16, target_modules=[layer.name for layer in sparse_layers(model)])

    def stepping(adapted: Any) -> Step:
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6)
        return lambda: timed(adapted, optimizer, batch, fast)

    masked = hf_sparse.get_peft_model(copy.deepcopy(model), copy.deepcopy(settings))
    return stepping(masked), stepping(peft.get_peft_model(model, settings))


def timed(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Any], fast: bool) -> float:
    """Seconds of one step."""
    model.train()
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.process_time() - start


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the results as Markdown."""
    found = {Cell(**row["cell"]): row for row in rows}
    if not (names := measured_texts(rows)):
        return
    head = ["zeros", "recovery", "lr", *(f"perplexity {name}" for name in names)]
    head += [f"recovered {name}" for name in names]
    head += ["sparsity", "same zeros", "CPU s per window", "peak, MB"]
    print_head(head)
    dense = found.get(Cell("0 %"))
    for cell, row in found.items():
        pruned = found.get(Cell(cell.zeros))
        label = NAMES[cell.method] + ", distilled" * cell.teacher
        label += f", {cell.dtype}" if cell.dtype != "float32" else ""
        columns = [cell.zeros, label, f"{row['lr']:g}" if "lr" in row else "-"]
        columns += [f"{row['perplexity'][name]:.2f}" for name in names]
        trained = dense is not None and pruned is not None and cell.method != "none"
        columns += [f"{share(row, pruned, dense, name):.0%}" if trained else "-" for name in names]
        columns += [
            f"{row['sparsity']:.4f}",
            {True: "yes", False: "no"}.get(row.get("same_zeros"), "-"),
        ]
        windows = row["tokens"] / WINDOW
        columns += [f"{row['seconds'] / windows:.2f}" if "seconds" in row else "-"]
        columns += [f"{row['peak_mb']:.0f}" if "peak_mb" in row else "-"]
        print("| " + " | ".join(columns) + " |")


def share(row: dict[str, Any], pruned: Any, dense: Any, name: str) -> float:
    """The share of the gap in log perplexity that is closed."""
    now, before, best = (math.log(each["perplexity"][name]) for each in (row, pruned, dense))
    return (before - now) / (before - best)


if __name__ == "__main__":
    main(options)
