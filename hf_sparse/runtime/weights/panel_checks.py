"""Whether packed weights that were read from a file are safe to run."""

from __future__ import annotations

import numpy as np
import torch

from hf_sparse.arguments import is_finite
from hf_sparse.runtime.kernels import spmm
from hf_sparse.runtime.kernels.spmm import INDEX_BYTES, SIDE_BY_SIDE, UNROLL
from hf_sparse.runtime.kernels.weight_types import WeightType, type_of
from hf_sparse.runtime.weights.damage import require
from hf_sparse.runtime.weights.panels import (
    CHUNK_ROWS,
    PANEL_UNIT,
    Array,
    PackedWeight,
    chunk_edges,
    tail,
)


def check(packed: PackedWeight, weight_type: WeightType) -> None:
    """Check that a packed weight, read from a file, leads the kernels nowhere but into its streams.

    All comparisons are exact: nothing is computed that could exceed 64 bits, and no slice is cut short.

    Args:
        packed: the weight.
        weight_type: the type that it was packed from.

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
        "values": (packed.values, spmm.packed_type(height, weight_type).array, ()),
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
        wanted = int(end) + tail(stream)
        require(len(stream) == wanted, f"{name} are cut off: {len(stream)} of {wanted}")
    check_values(packed.values)
    for chunk in range(count):
        _check_chunk(packed, chunk)


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
    narrow = INDEX_BYTES[height] == 1
    width, unit = (1 << 8, PANEL_UNIT) if narrow else (packed.columns, packed.columns)
    inside = (begin >= 0) & (begin < packed.columns) & (begin % unit == 0)
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
    require(is_finite(numbers), "some values are NaN or infinite")
