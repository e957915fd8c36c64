"""Weights of few bits in the order in which their kernels read them (`kernels/code_formats.py`).

One packed weight serves all targets, and both kinds of kernels: those for single tokens multiply codes
as integers, and so do those for tiles, a few rows at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hf_sparse.runtime.kernels.call import Operation, Slot
from hf_sparse.runtime.kernels.code_formats import (
    BLOCK,
    GROUPS,
    PATTERNS,
    ROWS,
    UNIT,
    CodeFormat,
)
from hf_sparse.runtime.kernels.code_rows import CODE_ROWS, name
from hf_sparse.runtime.weights.memory import Shelf

Array = NDArray

# Weights that are packed, or checked, together: bounds what is needed beside the result to about
# 20 MB (some 16 bytes for each of them).
TOGETHER = 1 << 20
# Bytes behind codes of a mask, which kernels may read.
PADDING = 64


@dataclass(frozen=True, eq=False)
class CodeWeight:
    """A weight `(rows, columns)` of few bits, in groups of 16 rows and blocks of 64 columns.

    Attributes:
        form: what codes and places mean.
        codes: `(groups, blocks, form.code_bytes)` uint8; of a mask all of them in a row, and 64 zeros.
        places: `(groups, blocks, form.place_bytes)` uint8.
        scales: `(groups, blocks, 64 / form.group, 16)` uint16, the bits of bfloat16; 0 for rows that
            there are not.
        starts: of a mask, `(groups, blocks)` int64, where each block's codes begin; else empty.
    """

    rows: int
    columns: int
    form: CodeFormat
    codes: Array
    places: Array
    scales: Array
    starts: Array

    @property
    def streams(self) -> tuple[Array, Array, Array, Array]:
        """What kernels read."""
        return self.codes, self.places, self.scales, self.starts

    @property
    def nbytes(self) -> int:
        """Bytes of all streams."""
        return sum(int(stream.nbytes) for stream in self.streams)

    @property
    def blocks(self) -> int:
        """Blocks of columns."""
        return int(self.scales.shape[1])

    def at(self, group: int, block: int = 0) -> dict[str, int]:
        """The addresses of the streams from a group of rows and a block on; of an empty one 0."""
        found = {"codes": 0, "places": 0, "scales": 0}
        for key, stream in zip(found, self.streams[:3], strict=True):
            if stream.ndim > 1 and stream.size:
                begin = group * stream.strides[0] + block * stream.strides[1]
                found[key] = stream.ctypes.data + begin
        if self.form.is_masked:
            found["codes"] = self.codes.ctypes.data
        return found

    def starts_at(self, block: int) -> int:
        """The address of what tells where codes of a mask begin, from a block on; 0 for none."""
        return self.starts.ctypes.data + 8 * block if self.form.is_masked else 0

    def operation(
        self, x: int, y: int | Slot, bias: int, first: int, last: int, *, add: bool
    ) -> Operation:
        """Multiply rows `first` (of whole groups) to `last` with one token.

        Args:
            x: address of all features, in eight bits (`code_rows.py`).
            y, bias: addresses of all features that come out; no bias is 0.
            first, last: which rows.
            add: onto what is in `y`.
        """
        group = first // ROWS
        found = self.at(group)
        if self.form.is_masked:
            found["codes"] += int(self.starts[group, 0])
        return CODE_ROWS.operation(
            name(self.form),
            **found,
            x=x,
            y=y + 4 * first,
            bias=bias and bias + 4 * first,
            rows=last - first,
            blocks=self.blocks,
            add=int(add),
        )


def find_patterns(codes: Array, bits: int) -> list[tuple[int, int]]:
    """The patterns of `PATTERNS[bits]` that codes `(rows, columns)` keep to, the dense one first."""
    most = {window: 0 for kept, window in PATTERNS[bits] if 0 < kept < window}
    for _, part in _in_parts(codes):
        for window in most:
            counts = np.bitwise_count(_masks(_padded(part, 1) != 0, window))
            most[window] = max(most[window], int(counts.max(initial=0)))
    return [
        (kept, window)
        for kept, window in PATTERNS[bits]
        if kept in (0, window) or most[window] <= kept
    ]


def format_for(bits: int, pattern: tuple[int, int], group_size: int) -> CodeFormat:
    """The format of codes with a scale for `group_size` columns."""
    group = max((size for size in GROUPS if group_size % size == 0), default=GROUPS[-1])
    return CodeFormat(bits, *pattern, group)


def pack_codes(
    codes: Array, scales: Array, group_size: int, form: CodeFormat, shelf: Shelf | None = None
) -> CodeWeight:
    """Pack codes.

    Args:
        codes: `(rows, columns)` integers, from -127 to 127, of 4 bits from -8 to 7, that keep to the
            format's pattern.
        scales: `(rows, ceil(columns / group_size))` float32, each a bfloat16; of 8 bits positive.
        group_size: columns of a scale: a multiple of the format's, or all of them.
        form: the format.
        shelf: where to put the streams.

    Memory:
        The packed weight, and about 20 MB.

    Raises:
        ValueError: a code or a scale is none of these, or the codes keep to another pattern.
    """
    rows, columns = codes.shape
    _check_given(codes, scales, group_size, form)
    groups, blocks = -(-rows // ROWS), -(-columns // BLOCK)
    room = (shelf or Shelf(0)).room
    shape = groups, blocks
    starts = np.zeros((0, 0), np.int64)
    if form.is_masked:
        starts, total = _starts(codes, shape)
        own = room(total + PADDING)
        own[total:] = 0
    else:
        own = room(groups * blocks * form.code_bytes).reshape(*shape, form.code_bytes)
    places = room(groups * blocks * form.place_bytes).reshape(*shape, form.place_bytes)
    stored = room(groups * blocks * form.scale_bytes).view(np.uint16).reshape(*shape, -1, ROWS)
    begins = np.arange(blocks * BLOCK // form.group) * form.group // group_size
    begins = np.minimum(begins, scales.shape[1] - 1)
    for first, part in _in_parts(codes):
        here = slice(first // ROWS, -(-(first + len(part)) // ROWS))
        if form.is_masked:
            masks, found = _pack_masked(_padded(part, ROWS))
            places[here] = masks
            own[starts[here.start, 0] :][: len(found)] = found
        else:
            own[here], places[here] = _pack_rows(_padded(part, ROWS), form)
        bits = np.zeros((len(stored[here]) * ROWS, len(begins)), np.uint16)
        bits[: len(part)] = _bits(scales[first : first + len(part)])[:, begins]
        by_groups = bits.reshape(-1, ROWS, blocks, BLOCK // form.group)
        stored[here] = by_groups.transpose(0, 2, 3, 1)
    return CodeWeight(rows, columns, form, own, places, stored, starts)


def _check_given(codes: Array, scales: Array, group_size: int, form: CodeFormat) -> None:
    """Raise a ValueError unless codes and scales can be packed."""
    rows, columns = codes.shape
    lowest, highest = (-127, 127) if form.bits == 8 else (-8, 7)
    if codes.size and not lowest <= int(codes.min()) <= int(codes.max()) <= highest:
        raise ValueError(
            f"codes are from {codes.min()} to {codes.max()}; wanted {lowest} to {highest} for "
            f"{form.bits} bits."
        )
    if group_size < columns and group_size % form.group:
        raise ValueError(
            f"scales are for {group_size} columns; the format has one for {form.group}."
        )
    wanted = rows, -(-columns // group_size)
    if scales.dtype != np.float32 or scales.shape != wanted:
        raise ValueError(
            f"scales are {scales.dtype} of shape {scales.shape}; wanted float32 of shape {wanted}."
        )
    if not (np.isfinite(scales).all() and (scales != 0).all()):
        raise ValueError("some scales are zero or not finite; wanted finite ones.")
    if form.bits == 8 and (scales < 0).any():
        raise ValueError("some scales of 8 bits are negative; wanted them above 0.")
    if (scales.view(np.uint32) & 0xFFFF).any():
        raise ValueError("some scales are no bfloat16: round them up to one before coding.")
    if (form.kept, form.window) not in find_patterns(codes, form.bits):
        raise ValueError(f"codes keep more than {form.pattern} columns in some windows.")


def _bits(scales: Array) -> Array:
    return (np.ascontiguousarray(scales).view(np.uint32) >> 16).astype(np.uint16)


def _in_parts(codes: Array) -> Iterator[tuple[int, Array]]:
    """Whole groups of rows, some at a time, and the first row of each."""
    step = max(ROWS, TOGETHER // max(codes.shape[1], 1) // ROWS * ROWS)
    for first in range(0, len(codes), step):
        yield first, codes[first : first + step]


def _padded(codes: Array, rows: int) -> Array:
    """Codes with zeros up to whole groups of rows and blocks."""
    shape = -(-codes.shape[0] // rows) * rows, -(-codes.shape[1] // BLOCK) * BLOCK
    if shape == codes.shape:
        return codes
    padded = np.zeros(shape, np.int8)
    padded[: codes.shape[0], : codes.shape[1]] = codes
    return padded


def _masks(nonzero: Array, window: int) -> Array:
    """For each row and window, the columns that are not zero as the bits of a number."""
    bits = np.packbits(nonzero, axis=1, bitorder="little")
    if window == 4:
        return np.stack([bits & 15, bits >> 4], axis=-1).reshape(len(bits), -1)
    return bits.view("<u2")


@functools.cache
def _places(kept: int, window: int) -> Array:
    """For each mask the places of its bits in order, up to `kept`, and then 0."""
    masks = np.arange(1 << window)
    table = np.zeros((len(masks), kept), np.uint8)
    count = np.zeros(len(masks), np.intp)
    for place in range(window):
        chosen = np.flatnonzero((masks >> place & 1).astype(bool) & (count < kept))
        table[chosen, count[chosen]] = place
        count[chosen] += 1
    return table


def _pack_rows(codes: Array, form: CodeFormat) -> tuple[Array, Array]:
    """Codes and places of whole groups and blocks, `(groups, blocks, bytes)` each."""
    rows, columns = codes.shape
    shape = rows // ROWS, ROWS, columns // BLOCK, form.units, UNIT

    def units(array: Array) -> Array:
        return array.reshape(shape).transpose(0, 2, 3, 1, 4)

    if form.is_dense:
        return _shared(units(codes), form.bits, form), np.zeros((shape[0], shape[2], 0), np.uint8)
    masks = _masks(codes != 0, form.window)
    places = _places(form.kept, form.window)[masks]  # (rows, windows, kept)
    values = np.take_along_axis(codes.reshape(*masks.shape, -1), places.astype(np.intp), axis=-1)
    values[np.arange(form.kept) >= np.bitwise_count(masks)[..., None]] = 0
    return _shared(units(values), form.bits, form), _shared(units(places), form.place_bits, None)


def _starts(codes: Array, shape: tuple[int, int]) -> tuple[Array, int]:
    """Where the codes of each block begin that are not zero, and how many there are."""
    counts = np.zeros(shape, np.int64)
    for first, part in _in_parts(codes):
        blocks = (_padded(part, ROWS) != 0).reshape(-1, ROWS, shape[1], BLOCK)
        counts[first // ROWS :][: len(blocks)] = np.count_nonzero(blocks, axis=(1, 3))
    ends = np.cumsum(counts).reshape(shape)
    return ends - counts, int(counts.sum())


def _pack_masked(codes: Array) -> tuple[Array, Array]:
    """Masks `(groups, blocks, bytes)` of whole groups and blocks, and the codes that they name."""
    shape = len(codes) // ROWS, ROWS, codes.shape[1] // BLOCK, BLOCK // UNIT, UNIT
    ordered = codes.reshape(shape).transpose(0, 2, 3, 1, 4).reshape(shape[0], shape[2], -1)
    there = ordered != 0
    return np.packbits(there, axis=-1, bitorder="little"), ordered[there].view(np.uint8)


def _shared(units: Array, bits: int, form: CodeFormat | None) -> Array:
    """Bytes of `(groups, blocks, units, 16, 4)` numbers of a few bits; of codes, if of a format."""
    offset = 8 if form is not None and bits == 4 else 0
    numbers = (units + np.int8(offset)).astype(np.int8).view(np.uint8) if offset else units
    numbers = np.ascontiguousarray(numbers).view(np.uint8)
    each = 8 // bits
    found = numbers[:, :, ::each].copy()
    for place in range(1, each):
        found |= numbers[:, :, place::each] << np.uint8(bits * place)
    return found.reshape(*found.shape[:2], -1)


def on(packed: CodeWeight, shelf: Shelf) -> CodeWeight:
    """The same weight with its streams on a shelf."""
    codes, places, scales = (shelf.place(stream) for stream in packed.streams[:3])
    return replace(packed, codes=codes, places=places, scales=scales)
