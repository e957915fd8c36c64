"""Format `rice`: the nonzeros, and the zeros before each of them in Rice codes.

    values (count,)   nonzeros in row-major order
    rice   (bytes,)   the low K bits of every gap, then the rest of every gap in unary

The number of zeros before a nonzero is `quotient * 2**K + remainder`. First come all remainders, K bits
each, the least significant bit first, filled up to a byte with zeros. Then all quotients: `quotient`
bits 0 and one bit 1, again filled up. K and the number of values stand in the layout. At random places
this is within 3 % of the mask's entropy, where whole codes of 4 bits take up to 30 % more: that counts
beside values of few bits.

Source: R. F. Rice and J. R. Plaunt, Adaptive variable-length coding for efficient compression of
spacecraft television data, 1971. The parts of each code are kept in two runs here, so that both are
read without a step a code.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_sparse.formats import bits
from hf_sparse.formats.bits import Bits
from hf_sparse.formats.error import FormatError
from hf_sparse.formats.format import LARGEST_WEIGHT, Encoded, Format, Weight, by_mask, nonzeros_and
from hf_sparse.patterns import Pattern

LARGEST_K = 30
# Remainders are packed this many at a time; a multiple of 8, so that each part fills its bytes.
_CHUNK = 1 << 18


def encode(weight: Weight, pattern: Pattern) -> Encoded:
    """The nonzeros, and the shortest Rice codes of the gaps before them."""
    gaps = np.diff(np.flatnonzero(weight.mask), prepend=-1) - 1
    low = _best_k(gaps)
    packed = np.concatenate([_pack_remainders(gaps, low), _pack_quotients(gaps >> low)])
    return by_mask("rice", weight, packed, (low, gaps.size))


def _best_k(gaps: NDArray[np.int64]) -> int:
    """The number of low bits that makes the codes shortest, the smallest of equals.

    One bit more saves ever fewer bits of the quotients, so that the first that saves none is the last.
    """
    low, quotients = 0, int(gaps.sum())
    while low < LARGEST_K:
        fewer = int((gaps >> low + 1).sum())
        if quotients - fewer <= gaps.size:
            break
        low, quotients = low + 1, fewer
    return low


def _pack_remainders(gaps: NDArray[np.int64], low: int) -> NDArray[np.uint8]:
    shifts = np.arange(low)
    chunks = [
        np.packbits(
            (gaps[start : start + _CHUNK, None] >> shifts & 1).reshape(-1), bitorder="little"
        )
        for start in range(0, gaps.size, _CHUNK)
    ]
    return np.concatenate(chunks) if chunks else np.empty(0, np.uint8)


def _pack_quotients(quotients: NDArray[np.int64]) -> NDArray[np.uint8]:
    ends = np.cumsum(quotients + 1)
    marks = np.zeros(int(ends[-1]) if ends.size else 0, bool)
    marks[ends - 1] = True
    return bits.pack_mask(marks)


def decode(
    values: Bits, packed: NDArray[np.uint8], rows: int, columns: int, low: int, count: int
) -> Bits:
    """Rebuild the flat weights.

    Raises:
        FormatError: another number of codes than values, a position out of range, bits behind the
            last code, or codes that are cut.
    """
    length = rows * columns
    if values.size != count:
        raise FormatError(f"rice places {count} nonzeros, but {values.size} values are stored")
    split = -(-count * low // 8)
    if packed.size < split or (count * low % 8 and packed[split - 1] >> (count * low % 8)):
        raise FormatError(
            f"rice has {packed.size} bytes, wanted {split} for {count} remainders of {low} bits, with "
            "zeros behind the last, and the quotients"
        )
    places = np.flatnonzero(np.unpackbits(packed[split:], bitorder="little"))
    last = int(places[-1]) if places.size else -1
    if places.size != count or -(-(last + 1) // 8) != packed.size - split:
        raise FormatError(
            f"rice has {places.size} quotients in {packed.size - split} bytes, wanted {count}, and "
            "nothing behind the last"
        )
    if last + 1 - count << low > length:
        raise FormatError(f"rice places a nonzero out of range for {length} weights")
    gaps = np.diff(places, prepend=-1) - 1 << low
    gaps += _remainders(packed[:split], count, low)
    positions = np.cumsum(gaps + 1) - 1
    if count and positions[-1] >= length:
        raise FormatError(
            f"rice places a nonzero at index {positions[-1]}, out of range for {length} weights"
        )
    weights = np.zeros(length, values.dtype)
    weights[positions] = values
    return weights


def _remainders(packed: NDArray[np.uint8], count: int, low: int) -> NDArray[np.int64]:
    found = np.zeros(count, np.int64)
    powers = 1 << np.arange(low)
    for start in range(0, count if low else 0, _CHUNK):
        size = min(_CHUNK, count - start)
        part = packed[start * low // 8 : -(-(start + size) * low // 8)]
        digits = np.unpackbits(part, count=size * low, bitorder="little").reshape(size, low)
        found[start : start + size] = digits @ powers
    return found


def check(rows: int, columns: int, low: int, count: int) -> bool:
    """Whether a layout may hold so many codes."""
    return 0 <= low <= LARGEST_K and 0 <= count <= LARGEST_WEIGHT


def _least(weight: Weight) -> int:
    """With one bit a code."""
    return nonzeros_and(weight, -(-weight.num_nonzeros // 8), 2)


RICE = Format(
    "rice",
    "the zeros before each nonzero, in Rice codes",
    encode,
    decode,
    num_parameters=2,
    check=check,
    least=_least,
    count=lambda packed, rows, columns, low, count: count,
    # Files of plain values stay readable by versions that have no such format.
    offered=lambda weight: weight.value_bits is not None,
)
