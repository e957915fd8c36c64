"""Weights in the order in which `shuffled_rows.py` reads them: a few of every window of columns."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hf_sparse.runtime.kernels.call import Operation
from hf_sparse.runtime.kernels.shuffled_rows import (
    LANES,
    SHUFFLED_ROWS,
    UNITS,
    WINDOWS,
    Window,
)
from hf_sparse.runtime.kernels.weight_types import FLOAT32, WeightType, type_of
from hf_sparse.runtime.weights.damage import require
from hf_sparse.runtime.weights.panel_checks import check_values
from hf_sparse.runtime.weights.rows import RowWeight

Array = NDArray


@dataclass(frozen=True, eq=False)
class ShuffledWeight(RowWeight):
    """A weight `(rows, columns)` as the streams that `shuffled_rows` reads.

    Rows go in groups of `window.rows`. A group has for each window `UNITS` units of 8 lanes; lane
    `l` of unit `u` holds kept weight `l % kept` of row `u * unit_rows + l // kept` of the group.

    Attributes:
        window: how many weights of how many columns are kept.
        values: `(groups, windows, UNITS, 8)` of one of the `WEIGHT_TYPES`; 0 where fewer are kept.
        words: `(groups, windows, UNITS)` uint32, the places of a unit's weights in their window,
            from the lowest bits on.
    """

    STREAMS = ("values", "words")

    window: Window
    values: Array
    words: Array

    def operation(
        self, x: int, y: int, bias: int, first: int, last: int, *, add: bool
    ) -> Operation:
        group = first // self.window.rows
        return SHUFFLED_ROWS.operation(
            self.window.kernel(type_of(self.values)),
            values=self.values.ctypes.data + group * self.values.strides[0],
            words=self.words.ctypes.data + group * self.words.strides[0],
            x=x,
            y=y + 4 * first,
            bias=bias and bias + 4 * first,
            rows=last - first,
            windows=self.words.shape[1],
            add=int(add),
        )


def find_window(weight: Array) -> Window | None:
    """The window that a weight `(rows, columns)` keeps to, of the fewest bytes; None: to none."""
    for window in WINDOWS:
        counts = np.bitwise_count(_masks(weight, window.columns))
        if int(counts.max(initial=0)) <= window.kept:
            return window
    return None


def pack_shuffled(
    weight: Array, window: Window, weight_type: WeightType = FLOAT32
) -> ShuffledWeight:
    """Pack a weight `(rows, columns)` float32 that keeps to a window, and was of `weight_type`."""
    rows, columns = weight.shape
    groups, windows, kept = -(-rows // window.rows), -(-columns // window.columns), window.kept
    padded = np.zeros((groups * window.rows, windows * window.columns), np.float32)
    padded[:rows, :columns] = weight
    masks = _masks(padded, window.columns)
    places = _places(window)[masks]  # (rows, windows, kept)
    values = np.take_along_axis(padded.reshape(*masks.shape, -1), places.astype(np.intp), axis=-1)
    values[np.arange(kept) >= np.bitwise_count(masks)[..., None]] = 0

    def units(array: Array) -> Array:
        ordered = array.reshape(groups, UNITS, window.unit_rows, windows, kept)
        ordered = ordered.transpose(0, 3, 1, 2, 4).reshape(groups, windows, UNITS, LANES)
        return np.ascontiguousarray(ordered)

    shifts = np.uint32(window.bits) * np.arange(LANES, dtype=np.uint32)
    words = (units(places).astype(np.uint32) << shifts).sum(axis=-1, dtype=np.uint32)
    return ShuffledWeight(rows, columns, window, weight_type.narrow(units(values)), words)


def _masks(weight: Array, columns: int) -> Array:
    """For each row and window, the columns that are not zero as the bits of a number."""
    rows, width = weight.shape
    nonzero = np.zeros((rows, -(-width // columns) * columns), bool)
    nonzero[:, :width] = weight != 0
    bits = np.packbits(nonzero, axis=1, bitorder="little")
    return bits if columns == 8 else bits.view("<u2")


@functools.cache
def _places(window: Window) -> Array:
    """For each mask the places of its bits in order, up to `kept`, and then 0."""
    masks = np.arange(1 << window.columns)
    table = np.zeros((len(masks), window.kept), np.uint8)
    count = np.zeros(len(masks), np.intp)
    for place in range(window.columns):
        chosen = np.flatnonzero((masks >> place & 1).astype(bool) & (count < window.kept))
        table[chosen, count[chosen]] = place
        count[chosen] += 1
    return table


def lane_places(packed: ShuffledWeight) -> Array:
    """The place of each lane in its window, `(groups, windows, UNITS, 8)`."""
    shifts = np.uint32(packed.window.bits) * np.arange(LANES, dtype=np.uint32)
    places: Array = packed.words[..., None] >> shifts & np.uint32(packed.window.columns - 1)
    return places


def check_shuffled(packed: ShuffledWeight, weight_type: WeightType) -> None:
    """Check that a weight from a file leads the kernel nowhere but into its streams and features.

    A place cannot leave its window, since it has no more bits; the streams have a place in them for
    each group, window and unit; and nothing stands for columns or rows that there are not.

    Raises:
        ValueError: a stream is of another type or shape, or a value is not finite, or stands for no
            row or no column.
    """
    rows, columns, window = packed.rows, packed.columns, packed.window
    require(window in WINDOWS, f"{window} is none of the windows that there are")
    require(rows > 0 and columns > 0, f"{rows} rows, {columns} columns")
    shape = (-(-rows // window.rows), -(-columns // window.columns), UNITS)
    require(packed.words.dtype == np.uint32, f"words are {packed.words.dtype}")
    require(packed.words.shape == shape, f"words have the shape {packed.words.shape}, not {shape}")
    require(packed.values.dtype == weight_type.array, f"values are {packed.values.dtype}")
    whole = (*shape, LANES)
    fits = packed.values.shape == whole
    require(fits, f"values have the shape {packed.values.shape}, not {whole}")
    for stream in (packed.words, packed.values):
        straight = stream.flags.c_contiguous and stream.flags.aligned
        require(straight, f"streams for single tokens are {stream.strides}")
    beyond = packed.words >> np.uint32(window.bits * LANES - 1) >> np.uint32(1)
    require(not beyond.any(), "some words have more bits than places")
    last = replace(packed, words=packed.words[:, -1:])
    left = columns - window.columns * (shape[1] - 1)
    require(bool((lane_places(last) < left).all()), "some places are beyond the last column")
    # Row `r` of the last group is in unit `r // unit_rows`, lanes from `r % unit_rows * kept` on.
    lanes = packed.values[-1].reshape(shape[1], -1)
    empty = lanes[:, (rows - window.rows * (shape[0] - 1)) * window.kept :]
    require(not type_of(packed.values).widen(empty).any(), "some values stand for no row")
    check_values(packed.values)
