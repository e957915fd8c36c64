"""Size, loading and saving of compressed checkpoints against the dense ones, on two real models.

    python benchmarks/checkpoints.py

- size: bytes of every target tensor against `nnz * itemsize + entropy of its mask` (for 2:4, the
  entropy of 2:4 masks): the largest ratio of all tensors;
- load: `from_pretrained` of the sparse and the dense folder in alternation, files in the page
  cache, median of ratios. The dense folder is mapped into memory and not read: "in use" reads one
  number of every page afterwards, for both. "process" is a new Python process that imports and
  loads;
- save: `save_pretrained` into an existing folder, in alternation;
- import: what `import hf_sparse` adds to `from transformers import AutoModel`, in new processes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()

import torch
from real_models import dense_minilm, dense_smollm2, machine
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.counts import TensorSparsity, format_table

CONFIGS = [
    *(SparsityConfig("unstructured", sparsity) for sparsity in (0.5, 0.7, 0.8, 0.9, 0.95)),
    SparsityConfig("2:4"),
]
GOALS = "goals: size 1.03 (1.08 at 0.95, 1.01 for 2:4), load 1.5, save 2.0"
REPEATS = 7


def main() -> None:
    """Print the tables."""
    disable_progress_bar()
    print(machine())
    print(f"{GOALS}\n")
    with tempfile.TemporaryDirectory() as temporary:
        for name, make, auto_class in (
            ("MiniLM-L6", dense_minilm, AutoModel),
            ("SmolLM2-135M", dense_smollm2, AutoModelForCausalLM),
        ):
            dense = make(Path(temporary) / name)
            rows = [measure(dense, auto_class, config) for config in CONFIGS]
            head = ("pattern", "size / bound", "file / dense", "load", "in use", "process", "save")
            print(f"{name}, float32: sparse over dense\n{format_table(head, rows)}\n")
    print(import_time())


def measure(dense: Path, auto_class: Any, config: SparsityConfig) -> tuple[str, ...]:
    """One row: a model pruned by magnitude to `config`."""
    model = auto_class.from_pretrained(dense)
    hf_sparse.prune_(model, config, "magnitude")
    sparse = hf_sparse.save_pretrained(model, dense.with_name("sparse"), config)
    found = hf_sparse.inspect_checkpoint(sparse)
    size = max(
        found.stored_bytes[tensor.name] / bound(tensor, config) for tensor in found.report.tensors
    )
    files = found.file_bytes / (dense / "model.safetensors").stat().st_size

    def save_dense() -> None:
        plain.save_pretrained(dense.with_name("saved-dense"))

    plain = auto_class.from_pretrained(dense)
    ratios = [
        ratio(
            lambda: auto_class.from_pretrained(sparse), lambda: auto_class.from_pretrained(dense)
        ),
        ratio(lambda: use(auto_class, sparse), lambda: use(auto_class, dense)),
        ratio(lambda: process(auto_class, sparse), lambda: process(auto_class, dense), repeats=3),
        ratio(lambda: hf_sparse.save_pretrained(model, sparse, config), save_dense),
    ]
    name = f"{config.pattern} {config.sparsity:.2f}"
    return (name, f"{size:.4f}", f"{files:.3f}", *(f"{value:.2f}" for value in ratios))


def bound(tensor: TensorSparsity, config: SparsityConfig) -> float:
    """Bytes of the nonzeros plus the entropy of the mask, for float32."""
    nonzeros = tensor.numel - tensor.zeros
    if config.pattern.implied_sparsity:
        return tensor.numel / 2 * 4 + tensor.numel / 4 * math.log2(6) / 8
    chance = nonzeros / tensor.numel
    entropy = -chance * math.log2(chance) - (1 - chance) * math.log2(1 - chance)
    return nonzeros * 4 + tensor.numel * entropy / 8


def ratio(sparse: Callable[[], Any], dense: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median of time ratios, each from two calls one after the other; the first pair is warm-up."""
    ratios = []
    for _ in range(repeats + 1):
        ratios.append(seconds(sparse) / seconds(dense))
    return statistics.median(ratios[1:])


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def use(auto_class: Any, folder: Path) -> None:
    """Load a model and read one number of every memory page of its weights."""
    for parameter in auto_class.from_pretrained(folder).parameters():
        parameter.flatten()[:: 4096 // parameter.element_size()].sum()


def process(auto_class: Any, folder: Path) -> None:
    """Load a model in a new process."""
    name = auto_class.__name__
    run(
        f"import hf_sparse\nfrom transformers import {name}\n{name}.from_pretrained({str(folder)!r})"
    )


def import_time() -> str:
    """Seconds that importing hf_sparse adds, median of several processes."""
    code = (
        "import time\nfrom transformers import AutoModel\nstart = time.perf_counter()\n"
        "import hf_sparse\nprint(time.perf_counter() - start)"
    )
    added = [float(run(code)) for _ in range(REPEATS)]
    return (
        f"import hf_sparse takes {statistics.median(added):.2f} s after `from transformers import "
        "AutoModel` (goal: 1.0)"
    )


def run(code: str) -> str:
    """Run code in a new Python process and return what it prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
