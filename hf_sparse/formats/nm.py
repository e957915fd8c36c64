"""Format `nm`: exactly N values for each M consecutive weights, and which of them they are.

    values (groups * N,)   the values of each group in order; a group with fewer than N nonzeros
                           is filled up with zeros at its lowest free positions
    nm     (bytes,)        the position set of each group, as its rank among the C(M, N) sets

Sets are ranked by their bitmask (bit j = weight j of the group) in ascending order. As many ranks
as fit share one little-endian word, first rank least significant: `word = r0 + r1 C + r2 C^2 ...`.
For 2:4 that is three groups in a byte (6^3 = 216): 2.667 bits a group, where entropy wants 2.585.
The last word is filled up with rank 0.
"""

from __future__ import annotations

from functools import cache
from math import comb

import numpy as np
from numpy.typing import NDArray

from hf_sparse.formats.bits import Bits, as_bits, nonzero_mask, place, take
from hf_sparse.formats.error import FormatError
from hf_sparse.formats.format import Encoded, Format, Weight, by_groups
from hf_sparse.patterns import NM, Pattern

# The tables have 2^M entries.
LARGEST_M = 16


@cache
def word_layout(n: int, m: int) -> tuple[int, int]:
    """Bytes of a word and ranks in it: the densest choice, the shorter word if two are equal."""
    sets = comb(m, n)
    choices = []
    for size in (1, 2, 4, 8):
        ranks = 0
        while sets ** (ranks + 1) <= 2 ** (8 * size):
            ranks += 1
        if ranks:
            choices.append((size / ranks, size, ranks))
    _, size, ranks = min(choices)
    return size, ranks


@cache
def _tables(n: int, m: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Rank by group mask (after filling up; -1 if it has too many bits), and mask by rank."""
    masks = np.arange(2**m)
    marked = (masks[:, None] >> np.arange(m)) & 1
    ordered = masks[marked.sum(axis=1) == n]
    missing = n - marked.sum(axis=1)
    fill = (1 - marked) * (np.cumsum(1 - marked, axis=1) <= missing[:, None])
    filled = masks + (fill << np.arange(m)).sum(axis=1)
    ranks = np.where(missing >= 0, np.searchsorted(ordered, filled), -1)
    return ranks.astype(np.int32), marked[ordered].astype(bool)


def encode(weight: Weight, pattern: Pattern) -> Encoded:
    """The values of each group, and the packed ranks of their places.

    Raises:
        ValueError: M does not divide in_features, or a group has more than N nonzeros.
    """
    rows, columns = weight.matrix_shape
    pattern.check_shape(rows, columns)
    n, m = pattern.parameters(rows, columns)
    values, packed = ranked(as_bits(weight.oriented).reshape(-1), n, m)
    return by_groups("nm", weight, values, packed, (n, m))


def ranked(weights: Bits, n: int, m: int) -> tuple[Bits, NDArray[np.uint8]]:
    """Values and packed ranks of flat `weights`, a multiple of `m` in number.

    Raises:
        ValueError: a group has more than `n` nonzeros.
    """
    nonzero = nonzero_mask(weights)
    ranks_by_mask, masks_by_rank = _tables(n, m)
    ranks = ranks_by_mask[_group_masks(nonzero, m)]
    if ranks.size and ranks.min() < 0:
        bad = np.flatnonzero(ranks < 0)
        raise ValueError(
            f"{bad.size} of {ranks.size} groups have more than {n} nonzeros in {m} (first: group "
            f"{bad[0]}), so the weight is not {n}:{m} sparse. Prune it to {n}:{m}, or store it with "
            "pattern 'unstructured'."
        )
    if np.count_nonzero(nonzero) == ranks.size * n:
        return take(weights, nonzero), _pack(ranks, n, m)
    values = take(weights, masks_by_rank[ranks].reshape(-1))
    values[~nonzero_mask(values)] = 0  # -0.0 becomes 0.0, as in every format
    return values, _pack(ranks, n, m)


def decode(
    values: Bits, packed: NDArray[np.uint8], rows: int, columns: int, n: int, m: int
) -> Bits:
    """Rebuild the flat weights.

    Raises:
        FormatError: wrong number of values or words, or a word that is no set of positions.
    """
    count = rows * columns
    groups = count // m
    if count % m or values.size != groups * n:
        raise FormatError(
            f"{n}:{m} stores {values.size} values, wanted {groups * n} for {count} weights"
        )
    return place(values, _unpack(packed, groups, n, m))


def _group_masks(nonzero: NDArray[np.bool_], m: int) -> NDArray[np.unsignedinteger]:
    """The mask of each group of `m` flat entries as a number, bit j = entry j."""
    if 8 % m == 0 or m == 16:  # groups lie within a byte, or are two bytes
        packed = np.packbits(nonzero, bitorder="little")
        if m == 16:
            return packed.view("<u2")
        shifts = np.arange(0, 8, m, dtype=np.uint8)
        masks = (packed[:, None] >> shifts) & np.uint8(2**m - 1)
        return masks.reshape(-1)[: nonzero.size // m]
    masks = np.zeros(nonzero.size // m, np.uint16)
    for position in range(m):
        masks |= nonzero[position::m].astype(np.uint16) << np.uint16(position)
    return masks


def _pack(ranks: NDArray[np.int32], n: int, m: int) -> NDArray[np.uint8]:
    size, per_word = word_layout(n, m)
    words = np.zeros(-(-ranks.size // per_word), np.uint64)
    for digit in range(per_word):
        part = ranks[digit::per_word].astype(np.uint64)
        words[: part.size] += part * np.uint64(comb(m, n) ** digit)
    return words.astype(f"<u{size}").view(np.uint8)


def _unpack(packed: NDArray[np.uint8], groups: int, n: int, m: int) -> NDArray[np.bool_]:
    """Which of the flat weights have a value."""
    size, per_word = word_layout(n, m)
    wanted = -(-groups // per_word) * size
    if packed.size != wanted:
        raise FormatError(f"{n}:{m} positions have {packed.size} bytes, wanted {wanted}")
    words = packed.view(f"<u{size}")
    sets, masks_by_rank = comb(m, n), _tables(n, m)[1]
    if words.size and int(words.max()) >= sets**per_word:
        raise FormatError(
            f"{n}:{m} positions hold the word {words.max()}, wanted < {sets**per_word}"
        )
    powers = np.array([sets**digit for digit in range(per_word)], np.uint64)
    if behind := groups % per_word:
        last = np.uint64(words[-1]) // powers[behind:] % np.uint64(sets)
        if last.any():
            raise FormatError(f"{n}:{m} positions hold ranks behind the last group, {groups - 1}")
    # Bytes are looked up in a table instead of being divided one by one.
    dividends = np.arange(sets**per_word) if size == 1 else words
    ranks = dividends[:, None].astype(np.uint64) // powers % np.uint64(sets)
    masks = masks_by_rank[ranks].reshape(-1, per_word * m)
    mask: NDArray[np.bool_] = masks[words] if size == 1 else masks
    return mask.reshape(-1)[: groups * m]


def count(packed: NDArray[np.uint8], rows: int, columns: int, n: int, m: int) -> int:
    """The number of values."""
    return rows * columns // m * n


def fits(pattern: Pattern) -> bool:
    """Whether it is an N:M pattern that the tables are made for."""
    return isinstance(pattern, NM) and pattern.m <= LARGEST_M


def check(rows: int, columns: int, n: int, m: int) -> bool:
    """Whether a layout may hold groups of this size."""
    return 1 <= n < m <= LARGEST_M and columns % m == 0


NM_RANKS = Format(
    "nm",
    "the positions in each group of an N:M weight",
    encode,
    decode,
    num_parameters=2,
    check=check,
    structured=True,
    fits=fits,
    stores=f"N:M patterns with M <= {LARGEST_M}",
    count=count,
)
