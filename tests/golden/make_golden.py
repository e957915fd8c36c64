"""Writes the golden files: one small weight in every format, as `<format>.safetensors`.

And one of few bits in every coding, beside formats of its positions, in `codes`.

    python -m tests.golden.make_golden

The files fix the bytes of the format (docs/format.md). They are made once: a change of a file is
a change of the format, which needs a new `CONFIG_VERSION`. `tests/formats/test_golden.py` compares them
with what `compress` gives today.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from hf_sparse.formats import compress, join
from hf_sparse.patterns import Pattern
from hf_sparse.quantization import Grid

FOLDER = Path(__file__).parent
NAME = "w"
WEIGHT = torch.tensor(
    [
        [0.0, 1.5, 0.0, -2.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 3.0, 0.0],
        [0.0, 0.0, 7.0, 0.0, 0.0, 0.0, 0.0, -0.5],
    ]
)
PATTERNS = {
    "bitmask": "unstructured",
    "gap4": "unstructured",
    "gap8": "unstructured",
    "nm": "2:4",
    "block": "block:2x4",
    "rice": "unstructured",
}
# On grids of 8 and of 4 bits.
CODED_WEIGHT = torch.tensor(
    [
        [0.0, 2.5, 0.0, -3.5, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 1.75, 0.0],
        [0.0, 0.0, 14.0, 0.0, 0.0, 0.0, 0.0, -16.0],
    ]
)
# Formats and grids by the names of the files.
CODED_FILES = {
    "bitmask-scales4": ("bitmask", Grid(4)),
    "bitmask-scales4-zero_points": ("bitmask", Grid(4, symmetric=False)),
    "nm-scales8": ("nm", Grid(8)),
    "rice-scales8-zero_points": ("rice", Grid(8, symmetric=False)),
    "gap4-scales4": ("gap4", Grid(4)),
    "gap8-scales4": ("gap8", Grid(4)),
    "block-scales4": ("block", Grid(4)),
    "dense-scales4": ("dense", Grid(4)),
    "dense-scales8": ("dense", Grid(8)),
}


def golden_parts(name: str) -> dict[str, Tensor]:
    """The parts of the weight in format `name`."""
    return compress(WEIGHT, name, Pattern.parse(PATTERNS[name]))


def golden_bytes(name: str) -> bytes:
    """The golden file of format `name`, as it is written today."""
    named = {join(NAME, part): tensor for part, tensor in golden_parts(name).items()}
    return save(named, metadata={"format": "pt"})


def coded_parts(file: str) -> dict[str, Tensor]:
    """The parts of the weight of few bits in the file of a name."""
    format, grid = CODED_FILES[file]
    pattern = Pattern.parse(PATTERNS.get(format, "unstructured"))
    return compress(CODED_WEIGHT, format, pattern, grid=grid)


def coded_bytes(file: str) -> bytes:
    """The file of a name, as it is written today."""
    named = {join(NAME, part): tensor for part, tensor in coded_parts(file).items()}
    return save(named, metadata={"format": "pt"})


if __name__ == "__main__":
    for name in PATTERNS:
        (FOLDER / f"{name}.safetensors").write_bytes(golden_bytes(name))
    for name in CODED_FILES:
        (FOLDER / "codes" / f"{name}.safetensors").write_bytes(coded_bytes(name))
