"""Weights as GGUF stores them: blocks of 32 codes with a float16 scale, or plain floats.

    Q8_0   scale (2 bytes), 32 codes in [-127, 127]                   weight = scale * code
    Q4_0   scale (2 bytes), 16 bytes: code + 8 of weights j (low half) and j + 16 (high half)

A scale of this package is a bfloat16. Where it is a float16, too, which `rounded` sees to, the products
are those of the checkpoint bit for bit. A group of more than 32 weights repeats its scale.

Source: ggml-quants.c of github.com/ggml-org/llama.cpp, and the package gguf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_sparse.quantization import Codes, Grid, codes_of

BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """A kind of tensor in a GGUF file.

    Attributes:
        name: of the type in the package gguf.
        row_bytes: what a row of so many weights takes.
        data: the bytes of a weight `(rows, columns)`, `(rows, row_bytes)`; of one row `(row_bytes,)`.
    """

    name: str
    row_bytes: Callable[[int], int]
    data: Callable[[Tensor], NDArray[np.uint8]]


def block_type(grid: Grid | None, dtype: torch.dtype) -> BlockType:
    """The type for weights on a grid, or for any in a dtype.

    Raises:
        ValueError: a grid with zero points, or a dtype that GGUF has not.
    """
    if grid is None:
        if dtype not in _FLOATS:
            raise ValueError(f"weights are {dtype}; wanted float32, float16 or bfloat16.")
        return _FLOATS[dtype]
    if not grid.symmetric:
        raise ValueError(
            f"weights are on the grid {grid}, and GGUF has none with zero points that keeps their "
            "values. Quantise the dense model with symmetric=True."
        )
    name, size, pack = ("Q8_0", 34, _bytes_of) if grid.bits == 8 else ("Q4_0", 18, _halves_of)

    def data(weight: Tensor) -> NDArray[np.uint8]:
        return _blocks(codes_of(weight, grid), pack)

    return BlockType(name, lambda columns: columns // BLOCK * size, data)


def check_columns(columns: int) -> None:
    """Refuse a coded weight whose rows are no whole blocks.

    Raises:
        ValueError: they are not.
    """
    if columns % BLOCK:
        raise ValueError(f"a row has {columns} weights; wanted a multiple of {BLOCK} for GGUF.")


def _blocks(
    codes: Codes, pack: Callable[[NDArray[np.int8]], NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """The blocks of a weight, row by row."""
    rows, columns = codes.codes.shape
    per_row = columns // BLOCK
    halves = codes.scales.half()
    if not torch.equal(halves.float(), codes.scales):
        wrong = int((halves.float() != codes.scales).sum())
        raise ValueError(
            f"{wrong} scales are no float16, which GGUF stores: they are below 2**-14 or above 65504. "
            "Quantise the model again with hf_sparse.quantize_, which leaves no such scales."
        )
    repeats = per_row // codes.scales.shape[1]
    scales = halves.repeat_interleave(repeats, 1).numpy().reshape(-1, 1).view(np.uint8)
    packed = pack(codes.codes.reshape(-1, BLOCK).numpy())
    return np.concatenate([scales, packed], 1).reshape(rows, -1)


def _bytes_of(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    return codes.view(np.uint8)


def _halves_of(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    shifted = (codes + 8).astype(np.uint8)
    packed: NDArray[np.uint8] = shifted[:, : BLOCK // 2] | shifted[:, BLOCK // 2 :] << np.uint8(4)
    return packed


def _floats(name: str, size: int) -> BlockType:
    def data(weight: Tensor) -> NDArray[np.uint8]:
        return weight.contiguous().view(torch.uint8).numpy()

    return BlockType(name, lambda columns: columns * size, data)


_FLOATS = {
    torch.float32: _floats("F32", 4),
    torch.float16: _floats("F16", 2),
    torch.bfloat16: _floats("BF16", 2),
}
