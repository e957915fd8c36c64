"""Weights in the order in which the kernels read them.

`pack` sorts and pairs the rows of a sparse weight (`spmm.py` tells why); the weight itself is not
kept. `unpack` gives it back; `panel_checks.py` tells whether streams from a file are safe to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_sparse.runtime.kernels import spmm
from hf_sparse.runtime.kernels.call import Argument, Operation
from hf_sparse.runtime.kernels.spmm import INDEX_BYTES, SIDE_BY_SIDE, UNROLL
from hf_sparse.runtime.kernels.weight_types import FLOAT32, WeightType, type_of
from hf_sparse.runtime.weights.memory import Shelf

Array = NDArray

# Rows that are finished before the next ones begin: their sums stay in L2.
CHUNK_ROWS = 768
# Columns of a panel where rates tell no other number, and what panels begin at multiples of.
PANEL_COLUMNS, PANEL_UNIT = 128, 64
# Bytes that kernels may read beyond a stream's end.
PADDING = 64


class Streams(NamedTuple):
    """What `spmm` reads of a weight; `spmm.py` tells how."""

    panels: Array
    groups: Array
    values: Array
    indices: Array
    order: Array


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A sparse weight `(rows, columns)` as the streams that `spmm` reads.

    Attributes:
        height: rows of a block; 1 for single weights.
        nonzeros: stored weights, the padding of pairs not counted.
        panels, groups, values, indices, order: the streams, see `spmm.py`.
        chunks: `(chunks + 1, 5)`, where each chunk of rows starts in the five streams.
        chunk_rows: `(chunks + 1,)`, the first row of each chunk.
    """

    rows: int
    columns: int
    height: int
    nonzeros: int
    panels: Array
    groups: Array
    values: Array
    indices: Array
    order: Array
    chunks: Array
    chunk_rows: Array

    @property
    def streams(self) -> Streams:
        """All streams."""
        return Streams(self.panels, self.groups, self.values, self.indices, self.order)

    def _streams_of(self, chunk: int) -> dict[str, int]:
        """Where `spmm` begins to read the streams for one chunk of rows."""
        first, following = self.chunks[chunk : chunk + 2].tolist()
        panels, groups, values, indices, rows = (
            stream.ctypes.data + at * stream.strides[0]
            for stream, at in zip(self.streams, first, strict=True)
        )
        return {
            "panels": panels,
            "panel_count": following[0] - first[0],
            "groups": groups,
            "values": values,
            "indices": indices,
            "rows": rows,
        }

    def operation(
        self, chunk: int, vectors: int, x: Argument, y: Argument, bias: int, start: int
    ) -> Operation:
        """Multiply one chunk of rows.

        Args:
            chunk: which.
            vectors: width of the tiles.
            x, y, bias: addresses of the columns' tile, the whole output tile, the whole bias.
            start: `START_*` of `spmm.py`.
        """
        kernel = spmm.name(self.height, vectors, type_of(self.values))
        return spmm.SIGNATURE.operation(
            kernel, **self._streams_of(chunk), x=x, y=y, bias=bias, start=start
        )

    @property
    def stored(self) -> int:
        """Weights that are multiplied, those that pad blocks and pairs included."""
        return int(self.chunks[-1, 2])

    def on(self, shelf: Shelf) -> PackedWeight:
        """The same weight with its streams on a shelf."""
        placed = Streams(*map(shelf.place, self.streams))
        return replace(self, **placed._asdict())

    @property
    def nbytes(self) -> int:
        """Bytes of all streams."""
        return sum(stream.nbytes for stream in self.streams)


def chunk_edges(rows: int) -> Array:
    """The first row of each chunk, and `rows`."""
    return np.array([*range(0, rows, CHUNK_ROWS), rows], np.int64)


def pack(weight: Array, height: int = 1, weight_type: WeightType = FLOAT32) -> PackedWeight:
    """Pack a weight; what is zero is not stored. As `pack_many`."""
    return pack_many([(weight, height)], 1, weight_type)[0]


def pack_many(
    weights: Sequence[tuple[Array, int]],
    threads: int = 1,
    weight_type: WeightType = FLOAT32,
    panel_columns: int = PANEL_COLUMNS,
) -> list[PackedWeight]:
    """Pack several weights; what is zero is not stored.

    Args:
        weights: weights `(rows, columns)` float32, and with each the height of its blocks, a key
            of `spmm.UNROLL`. Blocks that are only partly zero are stored whole.
        threads: chunks of rows that are packed at the same time.
        weight_type: the type that the weights came from, in which single ones are stored.
        panel_columns: of a panel, a multiple of `PANEL_UNIT`, at most 256.

    Raises:
        ValueError: a height does not divide the rows, or there are too many columns.
    """
    tasks = []
    for number, (weight, height) in enumerate(weights):
        rows, columns = weight.shape
        if rows % height:
            raise ValueError(f"{rows} rows cannot be divided into blocks of {height} x 1.")
        panel = panel_columns if INDEX_BYTES[height] == 1 else columns
        if panel > 1 << 16:
            raise ValueError(f"{columns} columns: blocks are packed for at most {1 << 16}.")
        tasks += [
            (number, weight[start : start + CHUNK_ROWS], height, panel, start, weight_type)
            for start in range(0, rows, CHUNK_ROWS)
        ]
    with ThreadPoolExecutor(threads) as pool:
        packed = list(pool.map(lambda task: (task[0], _pack_chunk(*task[1:])), tasks))
    return [
        _assembled(weight, height, [chunk for owner, chunk in packed if owner == number])
        for number, (weight, height) in enumerate(weights)
    ]


def _assembled(weight: Array, height: int, parts: list[tuple[Streams, int]]) -> PackedWeight:
    """One packed weight from its chunks: their streams, and the numbers of their nonzeros."""
    rows, columns = weight.shape
    sizes = np.array([[len(stream) for stream in streams] for streams, _ in parts], np.int64)
    chunks = np.zeros((len(parts) + 1, 5), np.int64)
    np.cumsum(sizes, axis=0, out=chunks[1:])
    joined = Streams(*map(_joined, zip(*(streams for streams, _ in parts), strict=True)))
    nonzeros = sum(nonzeros for _, nonzeros in parts)
    return PackedWeight(
        rows, columns, height, nonzeros, *joined, chunks=chunks, chunk_rows=chunk_edges(rows)
    )


def _joined(parts: tuple[Array, ...]) -> Array:
    """One stream, with room behind it for what kernels read too far."""
    behind = np.zeros((tail(parts[0]), *parts[0].shape[1:]), parts[0].dtype)
    return np.concatenate([*parts, behind])


@dataclass(frozen=True)
class _Nonzeros:
    """Nonzeros of a chunk of rows, or blocks of them, row by row.

    A segment is a row (of blocks) in a panel; they are numbered row by row.

    Attributes:
        block, column: of each: its row of blocks, and its column.
        segment, rank: of each: its segment, and how many of it come before.
        counts: `(rows of blocks, panels)`, how many a segment has.
    """

    block: Array
    column: Array
    segment: Array
    rank: Array
    counts: Array


@dataclass(frozen=True)
class _Pairs:
    """In which order the segments of a chunk come.

    Attributes:
        panels, groups, order: the streams.
        begin: of each segment: where its pair begins in `indices`.
        longer: of each segment: how many the longer side of its pair has.
        side: of each segment: which of its pair.
        twice: segments that have no other one beside them, and are on both sides.
        total: entries of `indices`.
    """

    panels: Array
    groups: Array
    order: Array
    begin: Array
    longer: Array
    side: Array
    twice: list[int]
    total: int


def _pack_chunk(
    weight: Array, height: int, panel_columns: int, first_row: int, weight_type: WeightType
) -> tuple[Streams, int]:
    """The streams of one chunk of rows, and the number of its nonzeros."""
    found = _count(weight, height, panel_columns)
    pairs = _pair_rows(found.counts, height, panel_columns, first_row)
    indices = np.zeros(pairs.total, np.uint8 if INDEX_BYTES[height] == 1 else np.uint16)
    values = np.zeros((pairs.total, height), np.float32)
    local = found.column % panel_columns
    stored = weight.reshape(-1, height, weight.shape[1])[found.block, :, found.column]
    slots = _place(pairs, height, found.segment, found.rank, pairs.side[found.segment])
    indices[slots], values[slots] = local, stored
    for segment in pairs.twice:
        at = np.flatnonzero(found.segment == segment)
        slots = _place(pairs, height, found.segment[at], found.rank[at], 1)
        indices[slots], values[slots] = local[at], stored[at]
    narrow = spmm.packed_type(height, weight_type).narrow(values.reshape(-1))
    streams = Streams(pairs.panels, pairs.groups, narrow, indices, pairs.order)
    return streams, len(found.block) * height


def _count(weight: Array, height: int, panel_columns: int) -> _Nonzeros:
    """Find the nonzeros, and count them by segments."""
    rows, columns = weight.shape
    blocks, panels = rows // height, -(-columns // panel_columns)
    mask = weight != 0
    if height > 1:
        mask = mask.reshape(blocks, height, columns).any(axis=1)
    block, column = np.divmod(np.flatnonzero(mask), columns)
    segment = block * panels + column // panel_columns
    counts = np.bincount(segment, minlength=blocks * panels)
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(block)) - starts[segment]
    return _Nonzeros(block, column, segment, rank, counts.reshape(blocks, panels))


def _pair_rows(counts: Array, height: int, panel_columns: int, first_row: int) -> _Pairs:
    """Sort each panel's segments by their nonzeros, and pair neighbours."""
    unroll, sides = UNROLL[height], SIDE_BY_SIDE[height]
    panels = counts.shape[1]
    begin, longer, own_side = (np.zeros(counts.size, np.int64) for _ in range(3))
    described, groups, order, twice, total = [], [], [], [], 0
    for number in range(panels):
        length = counts[:, number]
        rows = np.argsort(length, kind="stable")
        if number:  # rows without nonzeros here have nothing to do, except to start
            rows = rows[np.count_nonzero(length == 0) :]
        if len(rows) % sides:  # computed twice, side by side, and written twice
            twice.append(int(rows[-1]) * panels + number)
            rows = np.append(rows, rows[-1])
        pairs = rows.reshape(-1, sides)
        longest = length[pairs[:, -1]]
        starts = total + np.cumsum(longest * sides) - longest * sides
        total += int(longest.sum()) * sides
        for side in range(sides - 1, -1, -1):
            segments = pairs[:, side] * panels + number
            begin[segments], longer[segments], own_side[segments] = starts, longest, side
        lengths, repeated = np.unique(longest, return_counts=True)
        groups.append(np.stack([lengths % unroll, repeated, lengths // unroll], axis=1))
        described.append((number * panel_columns, len(lengths), int(number == 0)))
        order.append(pairs.reshape(-1) * height + first_row)
    return _Pairs(
        np.array(described, np.int32),
        np.concatenate(groups).astype(np.int32),
        np.concatenate(order).astype(np.int32),
        begin,
        longer,
        own_side,
        twice,
        total,
    )


def _place(pairs: _Pairs, height: int, segment: Array, rank: Array, side: Array | int) -> Array:
    """Where nonzeros go in `indices`: a round of one side, the same round of the other, and so on."""
    unroll, sides = UNROLL[height], SIDE_BY_SIDE[height]
    rest = pairs.longer[segment] % unroll
    later = rank - rest
    turn, within = np.divmod(later, unroll)
    first = side * rest + rank
    other = rest * sides + turn * (unroll * sides) + side * unroll + within
    placed: Array = pairs.begin[segment] + np.where(later < 0, first, other)
    return placed


def unpack(packed: PackedWeight) -> Array:
    """The weight that was packed, `(rows, columns)` float32."""
    weight = np.zeros((packed.rows, packed.columns), np.float32)
    height, stored = packed.height, type_of(packed.values).widen(packed.values)
    unroll, sides = UNROLL[height], SIDE_BY_SIDE[height]
    for chunk, following in pairwise(packed.chunks):
        at_panel, at_group, _, at, at_row = (int(start) for start in chunk)
        last = int(following[0])
        for first, groups, _ in packed.panels[at_panel:last]:
            for remainder, pairs, rounds in packed.groups[at_group : at_group + groups]:
                for _ in range(pairs):
                    rows = packed.order[at_row : at_row + sides]
                    at_row += sides
                    for count in [remainder, *[unroll] * rounds]:
                        for row in rows:
                            columns = first + packed.indices[at : at + count].astype(np.int64)
                            values = stored[height * at : height * (at + count)]
                            # What pads the shorter row of a pair is zero and hides nothing.
                            kept = values.reshape(-1, height).any(axis=1)
                            block = values.reshape(-1, height)[kept].T
                            weight[row : row + height, columns[kept]] = block
                            at += count
            at_group += groups
    return weight


def tail(stream: Array) -> int:
    """Entries behind a stream's last one: kernels may read `PADDING` bytes too far."""
    return -(-PADDING // stream.itemsize)
