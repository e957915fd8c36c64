"""Y (+)= W X for a sparse W: the kernel that the compiler exists for.

    Y[rows][tokens] = W[rows][columns] X[columns][tokens] (+ bias) (+ Y)

X and Y are tiles: row-major, one feature a row, `tokens` = 64, 32 or 16 floats wide on AVX-512, so
that a row is 4, 2 or 1 vectors and each nonzero of W is one broadcast and as many multiply-adds.
W is packed (`weights/panels.py`) into panels of columns. A panel's rows (or blocks of R rows that are
zero together) are sorted by their number of nonzeros and go in pairs of equal number, so that the
loop over a row's nonzeros always has the same length as the one before, and there is enough to do
while a multiply-add is under way.

Single weights may be of two bytes (`weight_types.py`): those of a round are widened at once, into
memory that stays in L1, and multiplied from there. With half the bytes to bring that is 7 to 10 %
faster than float32 at 50 to 90 % zeros (`benchmarks/weight_types.py`). Blocks stay float32: their
kernels wait for multiply-adds alone, and widening makes them up to 4 % slower, 10 % on AVX2.

Arguments: panels int32 triples, their number, groups int32 triples, values, indices uint8 (uint16 for
R = 4), rows int32, X, Y, bias, start. X and Y are aligned to 64 bytes. A panel is: its
first column, its groups, and 1 if its rows start here, from what `start` says (`START_*`), 0 if
they go on. A group is: nonzeros of a row modulo `UNROLL`, pairs, nonzeros of a row over `UNROLL`.
Nothing is checked here: `weights/panels.py` validates what it reads from files.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hf_sparse.runtime.kernels.call import Signature, parameters
from hf_sparse.runtime.kernels.extents import Call, Extent
from hf_sparse.runtime.kernels.weight_types import FLOAT32, WeightType
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, Variable, vector

Array = NDArray[np.int64]
# How a panel's rows start.
START_SUM, START_BIAS, START_SUM_BIAS = 0, 1, 2

# Nonzeros of a row in one round of its loop, by rows of a block.
UNROLL = {1: 8, 2: 4, 4: 4}
# Rows, or blocks of rows, that are multiplied side by side, each with indices of its own.
SIDE_BY_SIDE = {1: 2, 2: 2, 4: 1}
# Bytes of a column's index: blocks of 4 rows read X slowly enough that it may lie in L2, so that one
# panel holds all columns; the others need panels of 128 columns, which fit L1.
INDEX_BYTES = {1: 1, 2: 1, 4: 2}
# Bytes by which the weights are fetched ahead: they come from memory once in every inference.
_AHEAD_VALUES, _AHEAD_INDICES = 2048, 1024


SIGNATURE = Signature(
    parameters(
        "ptr panels, i64 panel_count, ptr groups, ptr values, ptr indices, ptr rows, ptr x, "
        "ptr y, ptr bias, i64 start"
    ),
    ("x", "y"),
)


def packed_type(height: int, weight_type: WeightType) -> WeightType:
    """The type in which blocks of `height` rows of a weight of type `weight_type` are packed."""
    return weight_type if height == 1 else FLOAT32


def name(height: int, vectors: int, weight_type: WeightType = FLOAT32) -> str:
    """The symbol of the kernel for blocks of `height` rows and tiles of `vectors` vectors."""
    return f"spmm{height}x{vectors}{weight_type.suffix}"


def spmm(target: Target, height: int, vectors: int, weight_type: WeightType = FLOAT32) -> Function:
    """The kernel for blocks of `height` x 1 weights and tiles `vectors` vectors wide."""
    extents = _Streams(target.lanes, height, 4 * target.lanes * vectors, weight_type).extents
    function = SIGNATURE.function(name(height, vectors, weight_type), extents)
    _Kernel(function, target, height, vectors, weight_type).write()
    return function


class _Streams:
    """How far a kernel reads its streams, and which rows of X and Y they tell of."""

    def __init__(self, lanes: int, height: int, row_bytes: int, weight_type: WeightType) -> None:
        self.height, self.row_bytes, self.weight_type = height, row_bytes, weight_type
        self.unroll, self.sides = UNROLL[height], SIDE_BY_SIDE[height]
        self.index_bytes = INDEX_BYTES[height]
        # Weights of two bytes are loaded by whole vectors, indices by words of eight bytes.
        self.together = 1 if weight_type is FLOAT32 else lanes

    def extents(self, call: Call) -> Iterator[Extent]:
        """What a call reads and writes."""
        call.wants(0 <= call["start"] <= 2, "a start of 0, 1 or 2")
        yield call.reads("panels", 12 * call["panel_count"])
        panels = call.array("panels", np.int32, 3 * call["panel_count"]).reshape(-1, 3)
        panels = panels.astype(np.int64)
        yield call.reads("groups", 12 * int(panels[:, 1].sum()))
        groups = call.array("groups", np.int32, 3 * int(panels[:, 1].sum())).reshape(-1, 3)
        left, pairs, rounds = groups.astype(np.int64).T
        call.wants(not len(left) or left.max() < self.unroll, f"remainders under {self.unroll}")
        yield call.reads("rows", 4 * self.sides * int(pairs.sum()))
        rows = call.array("rows", np.int32, self.sides * int(pairs.sum())).astype(np.int64)
        of_side = np.concatenate([[0], np.cumsum((left + rounds * self.unroll) * pairs)])
        (filled,) = np.nonzero(np.diff(of_side))
        if len(filled):
            count = self.unroll if rounds[filled[-1]] else int(left[filled[-1]])
            begin = (int(of_side[-1]) - count) * self.sides
            weights = -(-count * self.height * self.sides // self.together) * self.together
            values = self.weight_type.size * (begin * self.height + weights)
            words = -(-count * self.index_bytes // 8) * 8
            last = (self.sides - 1) * count * self.index_bytes + words
            yield call.reads("values", values)
            yield call.reads("indices", begin * self.index_bytes + last)
        edges = of_side[np.concatenate([[0], np.cumsum(panels[:, 1])])] * self.sides
        yield from self._rows(call, panels[:, 0], edges, rows)

    def _rows(self, call: Call, firsts: Array, edges: Array, rows: Array) -> Iterator[Extent]:
        kind = np.uint8 if self.index_bytes == 1 else np.uint16
        columns = call.array("indices", kind, int(edges[-1]))
        for first, begin, end in zip(firsts.tolist(), edges[:-1], edges[1:], strict=True):
            if end > begin:
                low, high = (int(f(columns[begin:end])) + first for f in (np.min, np.max))
                yield call.reads("x", self.row_bytes * (high + 1 - low), at=self.row_bytes * low)
        if len(rows):
            low, count = int(rows.min()), int(rows.max() - rows.min()) + self.height
            yield call.writes("y", self.row_bytes * count, at=self.row_bytes * low)
            if call["start"]:
                yield call.reads("bias", 4 * count, at=4 * low)


class _Kernel:
    def __init__(
        self, function: Function, target: Target, height: int, vectors: int, weight_type: WeightType
    ) -> None:
        self.f, self.target, self.weight_type = function, target, weight_type
        self.height, self.vectors = height, vectors
        self.lanes = target.lanes
        self.row_bytes = 4 * target.lanes * vectors
        self.unroll, self.sides = UNROLL[height], SIDE_BY_SIDE[height]
        self.index_bytes = INDEX_BYTES[height]
        # Sums that fit the registers, with room for a row of X and a weight.
        self.width = vectors
        while height * self.width * self.sides > target.registers // 2:
            self.width //= 2
        self.kind = vector(self.lanes)
        # The weights of a round, widened.
        round_size = 4 * height * self.sides * self.unroll
        self.widened = None if weight_type is FLOAT32 else function.scratch(round_size)

    def write(self) -> None:
        f = self.f
        panels, panel_count, groups, values, indices, rows, self.x, self.y, *rest = f.parameters
        self.bias, start = rest
        self.groups, self.values = f.variable(groups), f.variable(values)
        self.indices, self.rows = f.variable(indices), f.variable(rows)
        with f.range(panel_count) as panel:
            described = panels.at(panel * 12)
            first = described.load("i32").cast("zext", "i64")
            self.panel_x = self.x.at(first * self.row_bytes)
            self.start = described.at(8).load("i32").cast("zext", "i64") * start
            with f.range(described.at(4).load("i32").cast("zext", "i64")):
                group = self.groups.get()
                self.group_pairs = group.at(4).load("i32").cast("zext", "i64")
                self.rounds = group.at(8).load("i32").cast("zext", "i64")
                self.groups.set(group.at(12))
                for remainder in f.cases(group.load("i32"), self.unroll):
                    self._group(remainder)

    def _group(self, remainder: int) -> None:
        """All pairs of rows whose number of nonzeros leaves `remainder`."""
        f = self.f
        passes = self.vectors // self.width
        with f.range(self.group_pairs):
            rows = self.rows.get()
            places = [
                rows.at(4 * side).load("i32").cast("zext", "i64") for side in range(self.sides)
            ]
            self.rows.set(rows.at(4 * self.sides))
            values, indices = self.values.get(), self.indices.get()
            for turn in range(passes):
                self.values.set(values)
                self.indices.set(indices)
                self._pair(places, remainder, turn * self.width)

    def _pair(self, places: list[Value], remainder: int, first: int) -> None:
        """One row or block on each side, vectors `first ..` of the tile."""
        f = self.f
        outputs = [self.y.at(place * self.row_bytes + first * 4 * self.lanes) for place in places]
        zero = f.constant(0.0, self.kind)
        sums = [
            [[f.variable(zero) for _ in range(self.width)] for _ in range(self.height)]
            for _ in places
        ]
        for start in f.cases(self.start, 3):
            for side, place in enumerate(places):
                for row in range(self.height):
                    self._begin(start, sums[side][row], outputs[side], place, row)
        if remainder:
            self._multiply(sums, remainder, first)
        with f.range(self.rounds):
            self._multiply(sums, self.unroll, first)
        for side in range(self.sides):
            for row in range(self.height):
                for v, total in enumerate(sums[side][row]):
                    outputs[side].at(self._at(row, v)).store(total.get(), 4 * self.lanes)

    def _at(self, row: int, v: int) -> int:
        return row * self.row_bytes + v * 4 * self.lanes

    def _begin(
        self, start: int, sums: list[Variable], output: Value, place: Value, row: int
    ) -> None:
        bias = None
        if start in (START_BIAS, START_SUM_BIAS):
            bias = self.bias.at(place * 4 + 4 * row).load("float").splat(self.lanes)
        for v, total in enumerate(sums):
            if start == START_BIAS and bias is not None:
                total.set(bias)
                continue
            old = output.at(self._at(row, v)).load(self.kind, 4 * self.lanes)
            total.set(old if bias is None else old + bias)

    def _multiply(self, sums: list[list[list[Variable]]], count: int, first: int) -> None:
        """`count` nonzeros (blocks of them) of every side."""
        values, indices = self.values.get(), self.indices.get()
        index_bytes = count * self.index_bytes * self.sides
        value_bytes = self.weight_type.size * count * self.height * self.sides
        values.at(_AHEAD_VALUES).prefetch()
        if value_bytes > 64:
            values.at(_AHEAD_VALUES + 64).prefetch()
        if count == self.unroll:
            indices.at(_AHEAD_INDICES).prefetch()
        weights = values if self.widened is None else self._widen(values, self.widened, count)
        offsets = self._offsets(indices, count)
        for number in range(count):
            for side in range(self.sides):
                x = self.panel_x.at(offsets[side][number])
                columns = [
                    x.at(4 * self.lanes * (first + v)).load(self.kind, 4 * self.lanes)
                    for v in range(self.width)
                ]
                for row in range(self.height):
                    place = ((side * count) + number) * self.height + row
                    weight = weights.at(4 * place).load("float").splat(self.lanes)
                    for column, total in zip(columns, sums[side][row], strict=True):
                        total.set(self.f.fma(weight, column, total.get()))
        self.values.set(values.at(value_bytes))
        self.indices.set(indices.at(index_bytes))

    def _widen(self, values: Value, room: Value, count: int) -> Value:
        """`room`, with the weights of a round in float32; whole vectors are read."""
        for first in range(0, count * self.height * self.sides, self.lanes):
            place = values.at(self.weight_type.size * first)
            loaded = self.weight_type.load(self.f, self.target, place, self.lanes)
            room.at(4 * first).store(loaded, 4 * self.lanes)
        return room

    def _offsets(self, indices: Value, count: int) -> list[list[Value]]:
        """Byte offsets into X: indices are loaded eight bytes at a time and taken apart."""
        in_word = 8 // self.index_bytes
        bits = 8 * self.index_bytes
        shift = self.row_bytes.bit_length() - 1
        mask = ((1 << bits) - 1) << shift
        found: list[list[Value]] = []
        for side in range(self.sides):
            offsets: list[Value] = []
            base = side * count * self.index_bytes
            while len(offsets) < count:
                word = indices.at(base + len(offsets) * self.index_bytes).load("i64", 1)
                for place in range(min(in_word, count - len(offsets))):
                    move = shift - place * bits
                    moved = word << move if move > 0 else word >> -move if move < 0 else word
                    offsets.append(moved & mask)
            found.append(offsets)
        return found
