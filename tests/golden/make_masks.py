"""Writes the golden masks: which weights three methods keep, as bits.

    python -m tests.golden.make_masks [--compare]

They are made once, on a CPU with AVX-512. With --compare the masks of this machine are compared with
them, and the share of equal bits is printed; ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 computes
as on a CPU without AVX-512.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.structure.layers import target_layers
from tests.support.tiny_models import tiny_batches, tiny_model

FILE = Path(__file__).parent / "masks" / "masks.safetensors"
METHODS = {"magnitude": "unstructured", "wanda": "2:4", "sparsegpt": "unstructured"}


def mask_of(method: str) -> Tensor:
    """Which weights of all targets of a tiny model a method keeps: `(weights,)`, true for kept ones."""
    config = SparsityConfig(METHODS[method], 0.5)
    model = tiny_model("llama", hidden_size=64, intermediate_size=160)
    batches = None if method == "magnitude" else tiny_batches("llama", count=4, length=64)
    hf_sparse.prune_(model, config, method, batches)
    return torch.cat([(layer.weight != 0).reshape(-1) for layer in target_layers(model, config)])


def packed(mask: Tensor) -> Tensor:
    """Eight weights in a byte."""
    bits = torch.nn.functional.pad(mask, (0, -len(mask) % 8)).reshape(-1, 8).to(torch.uint8)
    return (bits * 2 ** torch.arange(8)).sum(dim=1).to(torch.uint8)


def equal_share(method: str) -> float:
    """The share of the weights that the golden mask and this machine's agree on."""
    mask = mask_of(method)
    differing = packed(mask) ^ load_file(FILE)[method]
    count = sum(int(byte).bit_count() for byte in differing.tolist())
    return 1 - count / len(mask)


def main() -> None:
    """Write the file, or compare with it."""
    torch.set_num_threads(1)
    if "--compare" in sys.argv[1:]:
        for method in METHODS:
            print(f"{method:10} {equal_share(method):.6f} of the bits are equal")
    else:
        save_file({method: packed(mask_of(method)) for method in METHODS}, FILE)


if __name__ == "__main__":
    main()
