"""Formats `gap4` and `gap8`: the nonzeros, and the number of zeros before each of them.

    values (nnz,)      nonzeros in row-major order
    gap4   (bytes,)    4-bit codes, low half of a byte first
    gap8   (bytes,)    8-bit codes

With `skip` = 15 (gap4) or 255 (gap8): code `skip` passes `skip` zeros and places no weight; any
other code g passes g zeros and places the next weight. Zeros after the last nonzero are not
coded. An odd number of 4-bit codes is filled up with one code 15.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from hf_sparse.formats import bits
from hf_sparse.formats.bits import Bits
from hf_sparse.formats.error import FormatError
from hf_sparse.formats.format import Encoded, Format, Weight, by_mask, nonzeros_and
from hf_sparse.patterns import Pattern


def encode(width: int, weight: Weight, pattern: Pattern) -> Encoded:
    """The nonzeros, and the gaps before them in `width` = 4 or 8 bits."""
    return by_mask(f"gap{width}", weight, codes_of(weight.mask, width))


def codes_of(mask: NDArray[np.bool_], width: int) -> NDArray[np.uint8]:
    """Code the gaps of the flat nonzero mask."""
    skip = 2**width - 1
    index = np.int32 if mask.size < 2**31 else np.int64
    positions = np.flatnonzero(mask).astype(index)
    gaps = np.diff(positions, prepend=index(-1)) - index(1)
    wide = np.flatnonzero(gaps >= skip)
    skips, gaps[wide] = np.divmod(gaps[wide], index(skip))
    before = np.zeros(positions.size, index)
    before[wide] = skips
    slots = np.arange(positions.size, dtype=index) + np.cumsum(before, dtype=index)
    codes = np.full(int(slots[-1]) + 1 if slots.size else 0, skip, np.uint8)
    codes[slots] = gaps
    if width == 8:
        return codes
    if codes.size % 2:
        codes = np.append(codes, np.uint8(skip))
    return bits.as_halves(codes)


def decode(width: int, values: Bits, coded: NDArray[np.uint8], rows: int, columns: int) -> Bits:
    """Rebuild the flat weights.

    Raises:
        FormatError: another number of codes than values, a position out of range, or skips behind
            the last value.
    """
    count, skip = rows * columns, 2**width - 1
    codes = coded if width == 8 else bits.halves(coded)
    places = codes != skip
    placed = int(np.count_nonzero(places))
    if placed != values.size:
        raise FormatError(
            f"gap{width} places {placed} nonzeros, but {values.size} values are stored"
        )
    if codes.size and not places[-(8 // width) :].any():
        raise FormatError(f"gap{width} goes on behind the last nonzero")
    # A placing code g moves g + 1 weights on, a skip moves `skip`. 256 would not fit in 8 bits.
    steps = codes + places if width == 4 else codes.astype(np.uint16) + places
    ends = np.cumsum(steps, dtype=np.int64)
    positions = ends[places] - 1
    if positions.size and positions[-1] >= count:
        raise FormatError(
            f"gap{width} places a nonzero at index {positions[-1]}, out of range for {count} weights"
        )
    weights = np.zeros(count, values.dtype)
    weights[positions] = values
    return weights


def _count(width: int, coded: NDArray[np.uint8], rows: int, columns: int) -> int:
    codes = coded if width == 8 else bits.halves(coded)
    return int(np.count_nonzero(codes != 2**width - 1))


def _least(width: int, weight: Weight) -> int:
    return nonzeros_and(weight, -(-weight.num_nonzeros * width // 8))


def _gaps(width: int) -> Format:
    return Format(
        f"gap{width}",
        f"the zeros before each nonzero, in {width}-bit codes",
        partial(encode, width),
        partial(decode, width),
        least=partial(_least, width),
        count=partial(_count, width),
    )


GAP4, GAP8 = _gaps(4), _gaps(8)
