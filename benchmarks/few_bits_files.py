"""Files of SmolLM2-135M at few bits: their size against the bound, and that the same weights come back.

    python benchmarks/few_bits_files.py
    python benchmarks/few_bits_files.py --gguf      # GGUF files of the same codes, too

Weights are pruned by magnitude and rounded to the nearest codes: enough for sizes, and no measure of
quality. Embeddings have 8 bits; they are the output head, too.

- MB: of the weight file, in 10^6 bytes; "bytes a weight" and "size / bound" of the coded targets.
  Bound: codes of the weights that are kept, scales, and the entropy of the mask; of 2:4 that of the
  pattern.
- save, load: seconds of `save_pretrained` and of `from_pretrained` in float32, once each.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", action="store_true", help="write GGUF files of the same codes")
    options = parser.parse_args()

import torch
from real_models import dense_smollm2, machine
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.checkpoint.inspect import CheckpointSparsity
from hf_sparse.quantization import rounded
from hf_sparse.report import format_table
from hf_sparse.structure.grids import gridded

GOAL = "goals: 2:4 in int4 with int8 embeddings at most 75 MB; size at most 1.03 of the bound"
GRID = {"group_size": 32, "embedding_bits": 8}
CONFIGS = [
    *(SparsityConfig("unstructured", 0.0, bits=bits, **GRID) for bits in (8, 4)),
    *(
        SparsityConfig("unstructured", sparsity, bits=bits, **GRID)
        for bits in (8, 4)
        for sparsity in (0.5, 0.7)
    ),
    *(SparsityConfig("2:4", bits=bits, **GRID) for bits in (8, 4)),
]


def main() -> None:
    """Print the table."""
    disable_progress_bar()
    print(machine())
    print(f"{GOAL}\n")
    with tempfile.TemporaryDirectory() as temporary:
        dense = dense_smollm2(Path(temporary) / "dense")
        size = (dense / "model.safetensors").stat().st_size
        print(f"SmolLM2-135M, float32: {size / 1e6:.1f} MB")
        rows = [measure(dense, config, options.gguf) for config in CONFIGS]
    head = ("zeros", "targets", "MB", "bytes a weight", "size / bound", "save", "load", "GGUF")
    print(format_table(head, rows))


@torch.no_grad()
def measure(dense: Path, config: SparsityConfig, gguf: bool) -> tuple[str, ...]:
    """One row: a model pruned by magnitude and rounded to `config`."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    plain = SparsityConfig(config.pattern, config.sparsity)
    if config.sparsity:
        hf_sparse.prune_(model, plain, "magnitude")
    kept = {}
    for layer, grid in gridded(model, config):
        kept[layer.weight_name] = int(layer.weight.count_nonzero())
        layer.weight.copy_(rounded(layer.weight, grid))
    folder = dense.with_name("coded")
    start = time.perf_counter()
    hf_sparse.save_pretrained(model, folder, config)
    saved = time.perf_counter() - start
    start = time.perf_counter()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    took = time.perf_counter() - start
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    found = hf_sparse.inspect_checkpoint(folder)
    weights = sum(tensor.numel for tensor in found.report.tensors)
    size = sum(found.stored_bytes[tensor.name] for tensor in found.report.tensors)
    return (
        f"{config.pattern} {config.sparsity:.2f}",
        f"int{config.bits}",
        f"{found.file_bytes / 1e6:.1f}",
        f"{size / weights:.4f}",
        f"{size / bound(found, config, kept):.4f}",
        f"{saved:.1f} s",
        f"{took:.1f} s",
        gguf_size(model, dense, config) if gguf else "-",
    )


def bound(found: CheckpointSparsity, config: SparsityConfig, kept: dict[str, int]) -> float:
    """Bytes of the codes of kept weights, of scales, and of the entropy of the masks."""
    total = 0.0
    for tensor in found.report.tensors:
        share = kept[tensor.name] / tensor.numel
        places = -sum(p * math.log2(p) for p in (share, 1 - share) if p)
        if config.pattern.implied_sparsity:
            share, places = 0.5, math.log2(6) / 4
        assert config.bits is not None
        total += tensor.numel * (share * config.bits + places + 16 / 32) / 8
    return total


def gguf_size(model: Any, dense: Path, config: SparsityConfig) -> str:
    """MB of a GGUF file of the same codes."""
    file = dense.with_name("coded.gguf")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    hf_sparse.export_gguf(model, file, config=config, tokenizer=tokenizer, overwrite=True)
    return f"{file.stat().st_size / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
