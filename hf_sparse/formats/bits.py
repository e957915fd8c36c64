"""Weights as unsigned integers: selecting, packing and placing nonzeros without arithmetic.

All formats work on the bit patterns of the values, so that every float type (fp32, fp16, bf16,
fp8, fp64) takes the same path and comes back bit for bit. Arrays are flat and row-major.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bits = NDArray[np.unsignedinteger]

_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
# Positions are taken this many weights at a time: the index arrays stay small and in cache.
_CHUNK = 1 << 19


def as_bits(weight: Tensor) -> Bits:
    """The bit patterns of a CPU tensor, same shape, sharing memory where it is contiguous."""
    return weight.detach().contiguous().view(_UNSIGNED[weight.element_size()]).numpy()


def as_weight(bits: Bits, dtype: torch.dtype) -> Tensor:
    """The tensor of `dtype` whose bit patterns are `bits`, sharing memory."""
    return torch.from_numpy(bits).view(dtype)


def nonzero_mask(bits: Bits) -> NDArray[np.bool_]:
    """True where the value is neither `0.0` nor `-0.0` (NaN is not zero)."""
    mask: NDArray[np.bool_] = np.left_shift(bits, 1) != 0
    return mask


def take(bits: Bits, mask: NDArray[np.bool_]) -> Bits:
    """The values of flat `bits` where flat `mask` is True, in order."""
    taken = np.empty(np.count_nonzero(mask), bits.dtype)
    done = 0
    for start in range(0, mask.size, _CHUNK):
        positions = np.flatnonzero(mask[start : start + _CHUNK])
        taken[done : done + positions.size] = bits[start : start + _CHUNK][positions]
        done += positions.size
    return taken


def place(values: Bits, mask: NDArray[np.bool_]) -> Bits:
    """A flat array of zeros with `values` where flat `mask` is True: undoes `take`."""
    placed = np.zeros(mask.size, values.dtype)
    done = 0
    for start in range(0, mask.size, _CHUNK):
        positions = np.flatnonzero(mask[start : start + _CHUNK])
        placed[start : start + _CHUNK][positions] = values[done : done + positions.size]
        done += positions.size
    return placed


def pack_mask(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """One bit per entry, least significant first, the last byte padded with zeros."""
    return np.packbits(mask.reshape(-1), bitorder="little")


def unpack_mask(packed: NDArray[np.uint8], count: int) -> NDArray[np.bool_]:
    """Undo `pack_mask` for `count` entries."""
    return np.unpackbits(packed, count=count, bitorder="little").view(bool)


def halves(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The halves of bytes, the low one of each first."""
    parts = np.empty(2 * packed.size, np.uint8)
    parts[0::2], parts[1::2] = packed & 15, packed >> 4
    return parts


def as_halves(numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Numbers below 16, an even number of them, as halves of bytes: undoes `halves`."""
    return np.bitwise_or(numbers[0::2], np.left_shift(numbers[1::2], np.uint8(4)))


def pack(numbers: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Numbers of 8 or 4 bits as bytes; of 4 bits two in each, filled up with a zero."""
    if width == 8:
        return numbers
    return as_halves(np.append(numbers, np.zeros(numbers.size % 2, np.uint8)))


def unpack(packed: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Undo `pack`, with what fills up the last byte."""
    return packed if width == 8 else halves(packed)
