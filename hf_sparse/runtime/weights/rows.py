"""Weights in the order in which the kernel for single tokens reads them (`single_token.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np

from hf_sparse.runtime.kernels.call import Operation
from hf_sparse.runtime.kernels.single_token import COLUMNS, GROUP, SPARSE_ROWS
from hf_sparse.runtime.kernels.weight_types import FLOAT32, WeightType, type_of
from hf_sparse.runtime.weights.damage import require
from hf_sparse.runtime.weights.memory import Shelf
from hf_sparse.runtime.weights.panel_checks import check_values
from hf_sparse.runtime.weights.panels import PADDING, Array

# Rows after which a DecodeWeight tells where its streams go on.
DECODE_ROWS = 64
# Threads share rows in units of these: whole groups of all kernels, and whole vectors.
SHARED_ROWS = 16


def share_rows(rows: int, threads: int) -> list[tuple[int, int]]:
    """First and last (exclusive) row of each thread, whole units of `SHARED_ROWS`; some have none."""
    units = -(-rows // SHARED_ROWS)
    edges = [min(round(units * t / threads) * SHARED_ROWS, rows) for t in range(threads + 1)]
    return list(pairwise(edges))


@dataclass(frozen=True, eq=False)
class RowWeight(ABC):
    """A weight `(rows, columns)` as the streams that a kernel for single tokens reads."""

    # The fields that are streams.
    STREAMS: ClassVar[tuple[str, ...]]

    rows: int
    columns: int

    def on(self, shelf: Shelf) -> Self:
        """The same weight with its streams on a shelf."""
        placed: dict[str, Any] = {name: shelf.place(getattr(self, name)) for name in self.STREAMS}
        return replace(self, **placed)

    @property
    def nbytes(self) -> int:
        """Bytes of all streams."""
        return sum(getattr(self, name).nbytes for name in self.STREAMS)

    @abstractmethod
    def operation(
        self, x: int, y: int, bias: int, first: int, last: int, *, add: bool
    ) -> Operation:
        """Multiply rows `first` (a multiple of `SHARED_ROWS`) to `last` with one token.

        Args:
            x, y, bias: addresses of all features; no bias is 0.
            first, last: which rows.
            add: onto what is in `y`.
        """


@dataclass(frozen=True, eq=False)
class DecodeWeight(RowWeight):
    """A weight `(rows, columns)` as the streams that `sparse_rows` of `single_token.py` reads.

    Attributes:
        words: `(ceil(rows / 4), ceil(columns / 16))` uint64, 16 bits for each row of a group.
        values: the nonzeros: by groups, by words, by rows; of one of the `WEIGHT_TYPES`.
        starts: where every `DECODE_ROWS` rows begin in `values`, and where the last ones end.
    """

    STREAMS = ("words", "values")

    words: Array
    values: Array
    starts: Array

    def operation(
        self, x: int, y: int, bias: int, first: int, last: int, *, add: bool
    ) -> Operation:
        weight_type, row_words = type_of(self.values), self.words.shape[1]
        unit = first // DECODE_ROWS
        before = self.words[unit * DECODE_ROWS // GROUP : first // GROUP]
        start = int(self.starts[unit]) + int(np.bitwise_count(before).sum(dtype=np.int64))
        return SPARSE_ROWS.operation(
            f"sparse_rows{weight_type.suffix}",
            words=self.words.ctypes.data + first // GROUP * row_words * 8,
            values=self.values.ctypes.data + weight_type.size * start,
            row_words=row_words,
            x=x,
            y=y + 4 * first,
            bias=bias and bias + 4 * first,
            groups=-(-(last - first) // GROUP),
            add=int(add),
        )


def pack_decode(weight: Array, weight_type: WeightType = FLOAT32) -> DecodeWeight:
    """Pack a weight `(rows, columns)` float32, which was of type `weight_type`, for single tokens."""
    rows, columns = weight.shape
    parts = [
        _pack_decode_rows(weight[start : start + DECODE_ROWS])
        for start in range(0, rows, DECODE_ROWS)
    ]
    starts = np.cumsum([0, *(len(values) for _, values in parts)])
    tail = np.zeros(PADDING // weight_type.size, weight_type.array)
    return DecodeWeight(
        rows,
        columns,
        np.concatenate([words for words, _ in parts]),
        np.concatenate([*(weight_type.narrow(values) for _, values in parts), tail]),
        starts.astype(np.int64),
    )


def _pack_decode_rows(weight: Array) -> tuple[Array, Array]:
    rows, columns = weight.shape
    padded = np.zeros((-(-rows // GROUP) * GROUP, -(-columns // COLUMNS) * COLUMNS), np.float32)
    padded[:rows, :columns] = weight
    # (groups, words, 4 rows, 16 columns): the order of the bits and of the values.
    ordered = padded.reshape(len(padded) // GROUP, GROUP, -1, COLUMNS).swapaxes(1, 2)
    mask = ordered != 0
    words = np.packbits(mask.reshape(*mask.shape[:2], -1), axis=-1, bitorder="little")
    return words.view("<u8")[..., 0], ordered[mask]


def check_decode(packed: DecodeWeight, weight_type: WeightType) -> None:
    """As `check`, for single tokens.

    Raises:
        ValueError: the bits name more values, or others, than there are, or one is not finite.
    """
    rows, columns, words = packed.rows, packed.columns, packed.words
    shape = (-(-rows // GROUP), -(-columns // COLUMNS))
    require(words.dtype == np.uint64, f"words are {words.dtype}")
    require(words.shape == shape, f"words have the shape {words.shape}, not {shape}")
    require(packed.values.dtype == weight_type.array, f"values are {packed.values.dtype}")
    require(packed.starts.dtype == np.int64, f"starts are {packed.starts.dtype}")
    for stream in (words, packed.values, packed.starts):
        fits = stream.flags.c_contiguous and stream.flags.aligned
        require(fits, f"streams for single tokens are {stream.strides}")
    # Bits beyond the last row and the last column stand for nothing: x and y have other data there.
    last_column, last_row = columns - COLUMNS * (shape[1] - 1), rows - GROUP * (shape[0] - 1)
    in_columns = sum(((1 << last_column) - 1) << COLUMNS * row for row in range(GROUP))
    beyond = ~np.uint64(in_columns), ~np.uint64((1 << COLUMNS * last_row) - 1)
    clean = not (words[:, -1] & beyond[0]).any() and not (words[-1] & beyond[1]).any()
    require(clean, "some bits stand for no row or no column")
    counts = np.bitwise_count(words).sum(axis=1, dtype=np.int64)
    each = np.add.reduceat(counts, np.arange(0, len(counts), DECODE_ROWS // GROUP))
    wanted = np.cumsum([0, *each])
    require(np.array_equal(packed.starts, wanted), "starts do not match the bits")
    room = int(wanted[-1]) + PADDING // weight_type.size
    require(len(packed.values) == room, f"values are cut off: {len(packed.values)} of {room}")
    check_values(packed.values)
