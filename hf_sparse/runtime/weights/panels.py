"""Weights in the order in which the kernels read them.

`pack` sorts and pairs the rows of a sparse weight (`spmm.py` tells why); the weight itself is not
kept. `unpack` gives it back, and `check` tells whether streams from a file are safe to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from hf_sparse.runtime.kernels import spmm
from hf_sparse.runtime.kernels.call import Argument, Operation
from hf_sparse.runtime.kernels.spmm import INDEX_BYTES, SIDE_BY_SIDE, UNROLL
from hf_sparse.runtime.kernels.weight_types import FLOAT32, WeightType, is_finite, type_of
from hf_sparse.runtime.weights.memory import Shelf

Array = NDArray

# Rows that are finished before the next ones begin: their sums stay in L2.
CHUNK_ROWS = 768
# Columns of a panel: 128 rows of a 64-token tile are 32 KB, which stay in L1.
PANEL_COLUMNS = 128
# Bytes that kernels may read beyond a stream's end.
PADDING = 64


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

    def _streams_of(self, chunk: int) -> dict[str, int]:
        """Where `spmm` begins to read the streams for one chunk of rows."""
        streams = (self.panels, self.groups, self.values, self.indices, self.order)
        first, following = self.chunks[chunk], self.chunks[chunk + 1]
        panels, groups, values, indices, rows = (
            stream.ctypes.data + int(at) * stream.strides[0]
            for stream, at in zip(streams, first, strict=True)
        )
        return {
            "panels": panels,
            "panel_count": int(following[0] - first[0]),
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
        return replace(
            self,
            panels=shelf.place(self.panels),
            groups=shelf.place(self.groups),
            values=shelf.place(self.values),
            indices=shelf.place(self.indices),
            order=shelf.place(self.order),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all streams."""
        streams = (self.panels, self.groups, self.values, self.indices, self.order)
        return sum(stream.nbytes for stream in streams)


def chunk_edges(rows: int) -> Array:
    """The first row of each chunk, and `rows`."""
    return np.array([*range(0, rows, CHUNK_ROWS), rows], np.int64)


def pack(weight: Array, height: int = 1, kept: WeightType = FLOAT32) -> PackedWeight:
    """Pack a weight; what is zero is not stored. As `pack_many`."""
    return pack_many([(weight, height)], 1, kept)[0]


def pack_many(
    weights: Sequence[tuple[Array, int]], threads: int = 1, kept: WeightType = FLOAT32
) -> list[PackedWeight]:
    """Pack several weights; what is zero is not stored.

    Args:
        weights: weights `(rows, columns)` float32, and with each the height of its blocks, a key
            of `spmm.UNROLL`. Blocks that are only partly zero are stored whole.
        threads: chunks of rows that are packed at the same time.
        kept: the type that the weights came from, in which single ones are stored.

    Raises:
        ValueError: a height does not divide the rows, or there are too many columns.
    """
    tasks = []
    for number, (weight, height) in enumerate(weights):
        rows, columns = weight.shape
        if rows % height:
            raise ValueError(f"{rows} rows cannot be divided into blocks of {height} x 1.")
        panel = PANEL_COLUMNS if INDEX_BYTES[height] == 1 else columns
        if panel > 1 << 16:
            raise ValueError(f"{columns} columns: blocks are packed for at most {1 << 16}.")
        tasks += [
            (number, weight[start : start + CHUNK_ROWS], height, panel, start, kept)
            for start in range(0, rows, CHUNK_ROWS)
        ]
    with ThreadPoolExecutor(threads) as pool:
        packed = list(pool.map(lambda task: (task[0], _pack_chunk(*task[1:])), tasks))
    return [
        _assembled(weight, height, [chunk for owner, chunk in packed if owner == number])
        for number, (weight, height) in enumerate(weights)
    ]


def _assembled(
    weight: Array, height: int, parts: list[tuple[tuple[Array, ...], int]]
) -> PackedWeight:
    """One packed weight from its chunks: their streams, and the numbers of their nonzeros."""
    rows, columns = weight.shape
    sizes = np.array([[len(stream) for stream in streams] for streams, _ in parts], np.int64)
    chunks = np.zeros((len(parts) + 1, 5), np.int64)
    np.cumsum(sizes, axis=0, out=chunks[1:])
    panels, groups, values, indices, order = (
        _joined([streams[number] for streams, _ in parts]) for number in range(5)
    )
    return PackedWeight(
        rows,
        columns,
        height,
        sum(nonzeros for _, nonzeros in parts),
        panels,
        groups,
        values,
        indices,
        order,
        chunks,
        chunk_edges(rows),
    )


def _joined(parts: list[Array]) -> Array:
    """One stream, with room behind it for what kernels read too far."""
    tail = np.zeros((_tail(parts[0]), *parts[0].shape[1:]), parts[0].dtype)
    return np.concatenate([*parts, tail])


def _pack_chunk(
    weight: Array, height: int, panel_columns: int, first_row: int, weight_type: WeightType
) -> tuple[tuple[Array, ...], int]:
    """The five streams of one chunk of rows, and the number of its nonzeros."""
    rows, columns = weight.shape
    unroll, sides = UNROLL[height], SIDE_BY_SIDE[height]
    blocks, panels = rows // height, -(-columns // panel_columns)
    mask = weight != 0
    if height > 1:
        mask = mask.reshape(blocks, height, columns).any(axis=1)
    found = np.flatnonzero(mask)
    block, column = np.divmod(found, columns)
    panel = column // panel_columns
    segment = block * panels + panel
    counts = np.bincount(segment, minlength=blocks * panels)
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(found)) - starts[segment]

    base = np.zeros(blocks * panels, np.int64)  # where the pair of a segment begins
    padded = np.zeros(blocks * panels, np.int64)  # nonzeros of a pair's longer side
    own_side = np.zeros(blocks * panels, np.int64)
    described, groups, order, twice, total = [], [], [], [], 0
    for number in range(panels):
        length = counts[number::panels]
        kept = np.argsort(length, kind="stable")
        if number:  # rows without nonzeros here have nothing to do, except to start
            kept = kept[np.count_nonzero(length == 0) :]
        if len(kept) % sides:  # computed twice, side by side, and written twice
            twice.append(kept[-1] * panels + number)
            kept = np.append(kept, kept[-1])
        pairs = kept.reshape(-1, sides)
        longer = length[pairs[:, -1]]
        pair_starts = total + np.cumsum(longer * sides) - longer * sides
        total += int(longer.sum()) * sides
        for side in range(sides - 1, -1, -1):
            segments = pairs[:, side] * panels + number
            base[segments], padded[segments], own_side[segments] = pair_starts, longer, side
        lengths, repeated = np.unique(longer, return_counts=True)
        groups.append(np.stack([lengths % unroll, repeated, lengths // unroll], axis=1))
        described.append((number * panel_columns, len(lengths), int(number == 0)))
        order.append(pairs.reshape(-1) * height + first_row)

    def place(segment: Array, rank: Array, side: Array | int) -> Array:
        rest = padded[segment] % unroll
        later = rank - rest
        turn, within = np.divmod(later, unroll)
        first = side * rest + rank
        other = rest * sides + turn * (unroll * sides) + side * unroll + within
        placed: Array = base[segment] + np.where(later < 0, first, other)
        return placed

    indices = np.zeros(total, np.uint8 if INDEX_BYTES[height] == 1 else np.uint16)
    values = np.zeros((total, height), np.float32)
    local = column - panel * panel_columns
    stored = weight.reshape(blocks, height, columns)[block, :, column]
    slots = place(segment, rank, own_side[segment])
    indices[slots], values[slots] = local, stored
    for chosen in twice:
        at = np.flatnonzero(segment == chosen)
        slots = place(segment[at], rank[at], 1)
        indices[slots], values[slots] = local[at], stored[at]
    streams = (
        np.array(described, np.int32),
        np.concatenate(groups).astype(np.int32),
        spmm.packed_type(height, weight_type).narrow(values.reshape(-1)),
        indices,
        np.concatenate(order).astype(np.int32),
    )
    return streams, len(found) * height


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


def check(packed: PackedWeight, kept: WeightType) -> None:
    """Check that a packed weight, read from a file, leads the kernels nowhere but into its streams.

    All comparisons are exact: nothing is computed that could exceed 64 bits, and no slice is cut short.

    Args:
        packed: the weight.
        kept: the type that it was packed from.

    Raises:
        ValueError: a count, a row or a column is out of range, or a value is not finite; the
            message tells which.
    """
    numbers = (packed.rows, packed.columns, packed.height, packed.nonzeros)
    require(all(type(number) is int for number in numbers), f"its sizes are {numbers}")
    rows, columns, height, _ = numbers
    require(height in UNROLL, f"blocks of {height} rows; wanted {list(UNROLL)}")
    require(rows > 0 and columns > 0, f"{rows} rows, {columns} columns")
    require(not rows % height, f"{rows} rows in blocks of {height}")
    wide = INDEX_BYTES[height] == 2
    require(columns <= 1 << 16 or not wide, f"{columns} columns in blocks of {height} rows")
    require(0 <= packed.nonzeros <= rows * columns, f"{packed.nonzeros} nonzeros")
    streams = {
        "panels": (packed.panels, np.dtype(np.int32), (3,)),
        "groups": (packed.groups, np.dtype(np.int32), (3,)),
        "values": (packed.values, spmm.packed_type(height, kept).array, ()),
        "indices": (packed.indices, np.dtype(np.uint16 if wide else np.uint8), ()),
        "order": (packed.order, np.dtype(np.int32), ()),
        "chunks": (packed.chunks, np.dtype(np.int64), (5,)),
        "chunk_rows": (packed.chunk_rows, np.dtype(np.int64), ()),
    }
    for name, (stream, kind, shape) in streams.items():
        fits = stream.dtype == kind and stream.ndim == 1 + len(shape) and stream.shape[1:] == shape
        fits = fits and stream.flags.c_contiguous and stream.flags.aligned
        require(fits, f"{name} are {stream.dtype} {stream.shape}")
    # The number of chunks is compared before anything is made of their rows.
    chunks, edges, count = packed.chunks, packed.chunk_rows, -(-rows // CHUNK_ROWS)
    straight = len(chunks) == len(edges) == count + 1 and np.array_equal(edges, chunk_edges(rows))
    require(straight, f"{len(edges)} chunk rows and {len(chunks)} chunks for {rows} rows")
    forward = bool((chunks[0] == 0).all() and (chunks[1:] >= chunks[:-1]).all())
    require(forward, "chunks go back")
    for end, (name, (stream, _, _)) in zip(chunks[-1], streams.items(), strict=False):
        wanted = int(end) + _tail(stream)
        require(len(stream) == wanted, f"{name} are cut off: {len(stream)} of {wanted}")
    check_values(packed.values)
    for chunk in range(count):
        _check_chunk(packed, chunk)


def _tail(stream: Array) -> int:
    """Entries behind a stream's last one: kernels may read `PADDING` bytes too far."""
    return -(-PADDING // stream.itemsize)


def _check_chunk(packed: PackedWeight, chunk: int) -> None:
    """Check one chunk of rows, whose places in the streams are right."""
    height = packed.height
    unroll, sides = UNROLL[height], SIDE_BY_SIDE[height]
    places = [slice(*edges) for edges in packed.chunks[chunk : chunk + 2].T.tolist()]
    first_row, last_row = packed.chunk_rows[chunk : chunk + 2].tolist()
    panels, groups = (
        stream[place].astype(np.int64)
        for stream, place in zip((packed.panels, packed.groups), places, strict=False)
    )
    indices, order = packed.indices[places[3]], packed.order[places[4]]
    begin, groups_of, starts = panels.T
    remainder, pairs, rounds = groups.T
    require(bool((groups_of >= 0).all()), "a panel has fewer than no groups")
    require(int(groups_of.sum()) == len(groups), "panels and groups do not match")
    right = len(panels) > 0 and starts[0] == 1 and not starts[1:].any()
    require(right, "panels begin in the wrong place")
    width = PANEL_COLUMNS if INDEX_BYTES[height] == 1 else packed.columns
    inside = (begin >= 0) & (begin < packed.columns) & (begin % width == 0)
    require(bool(inside.all()), "a panel begins at a column that none begins at")
    require(bool(((remainder >= 0) & (remainder < unroll)).all()), "a remainder is too large")
    require(bool(((pairs >= 0) & (rounds >= 0)).all()), "a count is negative")
    # Both factors are small now: pairs have their rows in a stream, a row has at most its columns.
    require(int(pairs.sum()) * sides == len(order), "groups and rows do not match")
    lengths = remainder + rounds * unroll
    require(bool((lengths <= width).all()), "groups have rows of more nonzeros than columns")
    counts = pairs * sides * lengths
    require(int(counts.sum()) == len(indices), "groups and indices do not match")
    values = places[2].stop - places[2].start
    require(values == len(indices) * height, "indices and values do not match")
    owner = np.repeat(np.arange(len(panels)), groups_of)
    ends = np.minimum(packed.columns - begin, width).astype(np.int32)
    require(bool((indices < np.repeat(ends[owner], counts)).all()), "a column is out of range")
    inside = (order >= first_row) & (order <= last_row - height)
    require(bool(inside.all()), "a row is out of range")
    require(not ((order - first_row) % height).any(), "a row is within a block")
    _check_rows(order, np.repeat(owner, pairs * sides), (last_row - first_row) // height, sides)


def _check_rows(order: Array, panel: Array, blocks: int, sides: int) -> None:
    """Check that all rows are begun once, and in no panel twice but where a pair lacks a second one.

    Args:
        order: rows.
        panel: of each of them.
        blocks: rows, or blocks of them, that there are.
        sides: rows of a pair.
    """
    last = np.append(panel[1:] != panel[:-1], True) if len(panel) else np.zeros(0, bool)
    repeated = np.append(False, order[1:] == order[:-1])[: len(order)] & last & (sides == 2)
    rows, panel = order[~repeated].astype(np.int64), panel[~repeated]
    begun = int(np.count_nonzero(panel == 0))
    require(begun == blocks, "a row is never begun, or begun twice")
    places = panel * (int(rows.max(initial=0)) + 1) + rows
    require(len(np.unique(places)) == len(places), "a row is never begun, or in a panel twice")


def check_values(values: Array) -> None:
    """Raise a ValueError unless all stored values are finite."""
    numbers = torch.from_numpy(values).view(type_of(values).dtype)
    require(is_finite(numbers), "some values are infinite or NaN")


def require(holds: bool, problem: str) -> None:
    """Raise a ValueError that tells the problem, unless it holds."""
    if not holds:
        raise ValueError(f"a packed weight is damaged: {problem}. Compile the model again.")
