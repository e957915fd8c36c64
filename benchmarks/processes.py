"""SparseGPT on SmolLM2-135M with one process and with two, one thread each: time and masks.

    python benchmarks/processes.py [--data FOLDER] [--method sparsegpt] [--num-samples 16]

The processes share the calibration windows and the solves (gloo, CPU). Time is that of `prune_`
alone. The masks are compared weight by weight, the perplexities on the first text of
`real_models.texts`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder with WikiText-2 and C4 texts")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--num-samples", type=int, default=16, help="windows of 512 tokens")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()

import torch
from accelerate import Accelerator
from real_models import dense_smollm2, machine, texts
from safetensors import safe_open
from safetensors.torch import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import hf_sparse
from hf_sparse import SparsityConfig


def main(options: argparse.Namespace) -> None:
    """Run one process, then two, and compare."""
    disable_progress_bar()
    if options.folder:
        worker(options)
        return
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dense_smollm2(folder / "dense")
        found = {processes: launch(processes, folder) for processes in (1, 2)}
        share = equal_masks(folder / "1.safetensors", folder / "2.safetensors")
    one, two = found[1], found[2]
    print(
        f"{options.method}, {options.num_samples} windows: {one['seconds']:.1f} s with one process, "
        f"{two['seconds']:.1f} s with two: {one['seconds'] / two['seconds']:.2f} times as fast\n"
        f"{share:.4%} of the masks equal; perplexity {one['perplexity']:.3f} and "
        f"{two['perplexity']:.3f}"
    )


def launch(processes: int, folder: Path) -> dict[str, Any]:
    """Prune with so many processes of one thread each."""
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *run, __file__, *sys.argv[1:], "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def worker(options: argparse.Namespace) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    calibration, held_out = texts(options.data)
    tokenizer = AutoTokenizer.from_pretrained(options.folder / "dense")
    batches = hf_sparse.calibration_batches(
        tokenizer, calibration, num_samples=options.num_samples, window=512
    )
    model = AutoModelForCausalLM.from_pretrained(options.folder / "dense")
    config = SparsityConfig("unstructured", 0.5)
    report = hf_sparse.prune_(model, config, options.method, batches, accelerator)
    if not accelerator.is_main_process:
        return
    save_model(model, str(options.folder / f"{accelerator.num_processes}.safetensors"))
    text = next(iter(held_out.values()))
    perplexity = hf_sparse.perplexity(model, tokenizer, text, 512, max_windows=16)
    print(json.dumps({"seconds": report.seconds, "perplexity": perplexity}))


def equal_masks(first: Path, second: Path) -> float:
    """The share of the weights in the blocks that are zero, or not, in both files."""
    equal, total = 0, 0
    with safe_open(first, "pt") as one, safe_open(second, "pt") as two:
        for name in one.keys():  # noqa: SIM118 - no mapping
            if "layers" in name and name.endswith("proj.weight"):
                pair = one.get_tensor(name), two.get_tensor(name)
                equal += int(((pair[0] == 0) == (pair[1] == 0)).sum())
                total += pair[0].numel()
    return equal / total


if __name__ == "__main__":
    main(options)
