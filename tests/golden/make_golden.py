"""Writes the golden files: one small weight in every format, as `<format>.safetensors`.

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
}


def golden_parts(name: str) -> dict[str, Tensor]:
    """The parts of the weight in format `name`."""
    return compress(WEIGHT, name, Pattern.parse(PATTERNS[name]))


def golden_bytes(name: str) -> bytes:
    """The golden file of format `name`, as it is written today."""
    named = {join(NAME, part): tensor for part, tensor in golden_parts(name).items()}
    return save(named, metadata={"format": "pt"})


if __name__ == "__main__":
    for name in PATTERNS:
        (FOLDER / f"{name}.safetensors").write_bytes(golden_bytes(name))
