"""Y (+)= W X for a W that has too few zeros, read as torch stores it: nothing is packed or copied.

As `spmm.py` with blocks of 4 rows and all columns: 4 rows share the loads of a row of X. Weights come
from 4 rows of W at a time, which are fetched ahead. Weights of two bytes (`weight_types.py`) are
widened 64 columns at a time, into memory that stays in L1.

Arguments: weight (row 0, the first column), bytes of a row, columns, first and last row (their
difference is a multiple of 4), X, Y, bias, start (`START_*`).
"""

from __future__ import annotations

from collections.abc import Iterator

from hf_sparse.runtime.kernels.call import Signature, parameters
from hf_sparse.runtime.kernels.extents import Call, Extent, Extents, rounded_up, strided
from hf_sparse.runtime.kernels.tile_sums import begun_sums, store_sums
from hf_sparse.runtime.kernels.weight_types import FLOAT32, WeightType
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, Variable, vector

ROWS = 4
# Columns in one round; what is left is multiplied one by one.
_UNROLL = 4
# Columns that are widened at once.
_WIDENED = 64


SIGNATURE = Signature(
    parameters(
        "ptr weight, i64 row_bytes, i64 columns, i64 first, i64 last, ptr x, ptr y, ptr bias, "
        "i64 start"
    ),
    ("x", "y"),
)


def name(vectors: int, weight_type: WeightType = FLOAT32) -> str:
    """The symbol of the kernel for tiles of `vectors` vectors."""
    return f"dense{vectors}{weight_type.suffix}"


def _extents(weight_type: WeightType, tile_row: int) -> Extents:
    def extents(call: Call) -> Iterator[Extent]:
        first, columns, stride = call["first"], call["columns"], call["row_bytes"]
        rows = rounded_up(call["last"] - first, ROWS)
        call.wants(0 <= call["start"] <= 2, "a start of 0, 1 or 2")
        yield call.reads(
            "weight", strided(rows, stride, weight_type.size * columns), at=first * stride
        )
        yield call.reads("x", tile_row * columns if rows else 0)
        yield call.writes("y", tile_row * rows, at=tile_row * first)
        if call["start"]:
            yield call.reads("bias", 4 * rows, at=4 * first)

    return extents


def dense(target: Target, vectors: int, weight_type: WeightType = FLOAT32) -> Function:
    """The kernel for tiles `vectors` vectors wide."""
    extents = _extents(weight_type, 4 * target.lanes * vectors)
    function = SIGNATURE.function(name(vectors, weight_type), extents)
    _Kernel(function, target, vectors, weight_type).write()
    return function


class _Kernel:
    def __init__(
        self, function: Function, target: Target, vectors: int, weight_type: WeightType
    ) -> None:
        self.f, self.target, self.weight_type, self.vectors = function, target, weight_type, vectors
        self.weight, self.row_bytes, self.columns, self.first, self.last, *rest = (
            function.parameters
        )
        self.x, self.y, self.bias, self.start = rest
        self.size, self.kind = 4 * target.lanes, vector(target.lanes)
        self.tile_row = self.size * vectors
        # Sums that fit the registers, with room for a row of X and a weight.
        self.width = vectors
        while ROWS * self.width > target.registers // 2:
            self.width //= 2
        self.widened = None if weight_type is FLOAT32 else function.scratch(4 * ROWS * _WIDENED)

    def write(self) -> None:
        with self.f.range(self.last, start=self.first, step=ROWS) as row:
            places = [self.weight.at((row + r) * self.row_bytes) for r in range(ROWS)]
            outputs = [self.y.at((row + r) * self.tile_row) for r in range(ROWS)]
            for first in range(0, self.vectors, self.width):
                sums = begun_sums(
                    self.f, self.target, self.start, self.bias, row, outputs, first, self.width
                )
                if self.widened is None:
                    self._multiply(places, self.x, self.columns, sums, first, ahead=True)
                else:
                    self._multiply_widened(places, self.widened, sums, first)
                store_sums(self.target, outputs, sums, first)

    def _multiply(
        self,
        weights: list[Value],
        inputs: Value,
        count: Value,
        sums: list[list[Variable]],
        first: int,
        *,
        ahead: bool,
    ) -> None:
        """`count` columns of 4 rows of floats; `ahead`: fetch the same columns of the next 4."""
        f = self.f
        whole = count / _UNROLL * _UNROLL
        with f.range(whole, step=_UNROLL) as column:
            for place in weights if ahead else ():
                place.at(self.row_bytes * ROWS).at(column * 4).prefetch()
            for number in range(_UNROLL):
                self._add(weights, inputs, column, number, sums, first)
        with f.range(count, start=whole) as column:
            self._add(weights, inputs, column, 0, sums, first)

    def _add(
        self,
        weights: list[Value],
        inputs: Value,
        column: Value,
        number: int,
        sums: list[list[Variable]],
        first: int,
    ) -> None:
        """Add the products with column `column + number`."""
        source = inputs.at(column * self.tile_row).at(number * self.tile_row)
        loaded = [
            source.at(self.size * (first + v)).load(self.kind, self.size) for v in range(self.width)
        ]
        for place, totals in zip(weights, sums, strict=True):
            factor = place.at(column * 4).at(4 * number).load("float")
            spread = factor.splat(self.target.lanes)
            for value, total in zip(loaded, totals, strict=True):
                total.set(self.f.fma(spread, value, total.get()))

    def _multiply_widened(
        self, places: list[Value], room: Value, sums: list[list[Variable]], first: int
    ) -> None:
        """All columns of 4 rows of two-byte weights, which `room` takes as floats, some at a time."""
        f = self.f
        widened = [room.at(4 * r * _WIDENED) for r in range(ROWS)]
        with f.range(self.columns, step=_WIDENED) as begun:
            count = f.minimum_integer(self.columns - begun, f.constant(_WIDENED, "i64"))
            sources = [place.at(begun * self.weight_type.size) for place in places]
            self._widen(sources, widened, count)
            inputs = self.x.at(begun * self.tile_row)
            self._multiply(widened, inputs, count, sums, first, ahead=False)

    def _widen(self, sources: list[Value], goals: list[Value], count: Value) -> None:
        """Write `count` weights of each row as float32."""
        f, lanes = self.f, self.target.lanes
        whole = count / lanes * lanes
        with f.range(whole, step=lanes) as i:
            for source, goal in zip(sources, goals, strict=True):
                place = source.at(i * self.weight_type.size)
                place.at(self.row_bytes * ROWS).prefetch()
                loaded = self.weight_type.load(f, self.target, place, lanes)
                goal.at(i * 4).store(loaded, 4 * lanes)
        with f.range(count, start=whole) as i:
            for source, goal in zip(sources, goals, strict=True):
                place = goal.at(i * 4)
                place.store(
                    self.weight_type.load(f, self.target, source.at(i * self.weight_type.size))
                )
