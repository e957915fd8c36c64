"""Wanda on SmolLM2-135M: perplexity against magnitude and dense, time and memory.

    python benchmarks/wanda.py                  # text: prose that Python ships
    python benchmarks/wanda.py --data FOLDER    # WikiText-2 and C4, see real_models.texts

Every method runs in a process of its own, so that its peak memory (RSS) is its own. The time of
pruning is given over one plain forward pass of the model over the calibration windows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from real_models import dense_smollm2, machine, texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.report import format_table

VARIANTS = {
    "dense": None,
    "magnitude 0.5": ("magnitude", SparsityConfig("unstructured", 0.5)),
    "wanda 0.5": ("wanda", SparsityConfig("unstructured", 0.5)),
    "magnitude 2:4": ("magnitude", SparsityConfig("2:4")),
    "wanda 2:4": ("wanda", SparsityConfig("2:4")),
}
GOALS = "goals for Wanda: peak - model at most 1000 MB, time / forward at most 2.5, below magnitude"


def main() -> None:
    """Print the table, or with --variant measure one row in this process."""
    options = parse_arguments()
    disable_progress_bar()
    if options.variant:
        print(json.dumps(measure(options)))
        return
    print(machine())
    windows = f"{options.num_samples} x {options.window} calibration tokens"
    print(f"SmolLM2-135M, float32, {windows}; first {options.max_windows} windows of each text")
    print(GOALS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = dense_smollm2(Path(temporary) / "dense")
        found = {name: in_process(name, folder) for name in VARIANTS}
    names = list(found["dense"]["perplexity"])
    head = (
        "variant",
        *(f"perplexity {name}" for name in names),
        "seconds",
        "time / forward",
        "peak RSS, MB",
        "peak - model, MB",
    )
    rows = [
        (
            name,
            *(f"{row['perplexity'][text]:.2f}" for text in names),
            *(
                f"{row[key]:.{digits}f}" if row.get(key) else "-"
                for key, digits in (
                    ("seconds", 1),
                    ("forwards", 2),
                    ("peak_mb", 0),
                    ("extra_mb", 0),
                )
            ),
        )
        for name, row in found.items()
    ]
    print(format_table(head, rows))


def in_process(variant: str, folder: Path) -> dict[str, Any]:
    """Measure one variant in a new process."""
    arguments = [*sys.argv[1:], "--variant", variant, "--folder", str(folder)]
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Prune, and measure time, memory and perplexity."""
    calibration, held_out = texts(options.data)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    batches = hf_sparse.calibration_batches(
        tokenizer, calibration, num_samples=options.num_samples, window=options.window
    )
    model = AutoModelForCausalLM.from_pretrained(options.folder)
    row: dict[str, Any] = {}
    if (variant := VARIANTS[options.variant]) is not None:
        method, config = variant
        report = hf_sparse.prune_(model, config, method, batches if method == "wanda" else None)
        row["seconds"] = report.seconds
        row["peak_mb"] = peak_mb()
        row["extra_mb"] = row["peak_mb"] - model.get_memory_footprint() / 1e6
        if method == "wanda":
            start = time.perf_counter()
            for batch in batches:
                model(**batch)
            row["forwards"] = report.seconds / (time.perf_counter() - start)
    row["perplexity"] = {
        name: hf_sparse.perplexity(
            model, tokenizer, documents, options.window, max_windows=options.max_windows
        )
        for name, documents in held_out.items()
    }
    return row


def peak_mb() -> float:
    """Most memory that this process has had resident, Python and libraries included (Linux)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder with WikiText-2 and C4 texts")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    parser.add_argument("--max-windows", type=int, default=32, help="windows of each text")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
