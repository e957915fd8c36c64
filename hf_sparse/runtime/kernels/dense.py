"""Y (+)= W X for a W that has too few zeros, read as torch stores it: nothing is packed or copied.

As `spmm.py` with blocks of 4 rows and all columns: 4 rows share the loads of a row of X. Weights come
from 4 rows of W at a time, which are fetched ahead. Weights of two bytes (`weight_types.py`) are
widened 64 columns at a time, into memory that stays in L1.

Arguments: weight (row 0, the first column), bytes of a row, columns, first and last row (their
difference is a multiple of 4), X, Y, bias, start (`START_*`).
"""

from __future__ import annotations

from hf_sparse.runtime.kernels import spmm
from hf_sparse.runtime.kernels.call import Signature
from hf_sparse.runtime.kernels.weight_types import FLOAT32, WeightType
from hf_sparse.runtime.llvm.ir import Function, Value, vector
from hf_sparse.runtime.llvm.target import Target

ROWS = 4
# Columns in one round; what is left is multiplied one by one.
_UNROLL = 4
# Columns that are widened at once.
_WIDENED = 64


SIGNATURE = Signature(
    (
        "ptr weight",
        "i64 row_bytes",
        "i64 columns",
        "i64 first",
        "i64 last",
        "ptr x",
        "ptr y",
        "ptr bias",
        "i64 start",
    ),
    ("x", "y"),
)


def name(vectors: int, kept: WeightType = FLOAT32) -> str:
    """The symbol of the kernel for tiles of `vectors` vectors."""
    return f"dense{vectors}{kept.suffix}"


def dense(target: Target, vectors: int, kept: WeightType = FLOAT32) -> Function:
    """The kernel for tiles `vectors` vectors wide."""
    f = SIGNATURE.function(name(vectors, kept))
    weight, row_bytes, columns, first_row, last_row, x, y, bias, start = f.parameters
    size, kind = 4 * target.lanes, vector(target.lanes)
    tile_row = size * vectors
    width = vectors
    while ROWS * width > target.registers // 2:
        width //= 2
    zero = f.constant(0.0, kind)
    scratch = None if kept is FLOAT32 else f.scratch(4 * ROWS * _WIDENED)
    with f.range(last_row, start=first_row, step=ROWS) as row:
        places = [weight.at((row + r) * row_bytes) for r in range(ROWS)]
        outputs = [y.at((row + r) * tile_row) for r in range(ROWS)]
        for first in range(0, vectors, width):
            sums = [[f.variable(zero) for _ in range(width)] for _ in range(ROWS)]
            for mode in f.cases(start, 3):
                for r in range(ROWS):
                    for v, total in enumerate(sums[r]):
                        value = zero
                        if mode in (spmm.START_SUM, spmm.START_SUM_BIAS):
                            value = outputs[r].at(size * (first + v)).load(kind, size)
                        if mode in (spmm.START_BIAS, spmm.START_SUM_BIAS):
                            added = bias.at(row * 4 + 4 * r).load("float")
                            value = value + added.splat(target.lanes)
                        total.set(value)

            def multiply(  # type: ignore[no-untyped-def]
                weights: list[Value],
                inputs: Value,
                column: Value,
                count: int,
                first=first,
                sums=sums,
            ) -> None:
                for number in range(count):
                    source = inputs.at(column * tile_row).at(number * tile_row)
                    loaded = [source.at(size * (first + v)).load(kind, size) for v in range(width)]
                    for place, totals in zip(weights, sums, strict=True):
                        factor = place.at(column * 4).at(4 * number).load("float")
                        spread = factor.splat(target.lanes)
                        for value, total in zip(loaded, totals, strict=True):
                            total.set(f.fma(spread, value, total.get()))

            def multiply_all(
                weights: list[Value], inputs: Value, count: Value, ahead: bool
            ) -> None:
                whole = count / _UNROLL * _UNROLL
                with f.range(whole, step=_UNROLL) as column:
                    for place in weights if ahead else ():  # the same columns of the next four rows
                        place.at(row_bytes * ROWS).at(column * 4).prefetch()
                    multiply(weights, inputs, column, _UNROLL)
                with f.range(count, start=whole) as column:
                    multiply(weights, inputs, column, 1)

            if scratch is None:
                multiply_all(places, x, columns, ahead=True)
            else:
                widened = [scratch.at(4 * r * _WIDENED) for r in range(ROWS)]
                with f.range(columns, step=_WIDENED) as begun:
                    count = f.minimum_integer(columns - begun, f.constant(_WIDENED, "i64"))
                    sources = [place.at(begun * kept.size) for place in places]
                    _widen(f, target, kept, sources, widened, count, row_bytes)
                    multiply_all(widened, x.at(begun * tile_row), count, ahead=False)
            for r in range(ROWS):
                for v, total in enumerate(sums[r]):
                    outputs[r].at(size * (first + v)).store(total.get(), size)
    return f


def _widen(
    f: Function,
    target: Target,
    kept: WeightType,
    sources: list[Value],
    goals: list[Value],
    count: Value,
    row_bytes: Value,
) -> None:
    """Write `count` weights of each row as float32."""
    whole = count / target.lanes * target.lanes
    with f.range(whole, step=target.lanes) as i:
        for source, goal in zip(sources, goals, strict=True):
            place = source.at(i * kept.size)
            place.at(row_bytes * ROWS).prefetch()
            loaded = kept.load(f, target, place, target.lanes)
            goal.at(i * 4).store(loaded, 4 * target.lanes)
    with f.range(count, start=whole) as i:
        for source, goal in zip(sources, goals, strict=True):
            goal.at(i * 4).store(kept.load(f, target, source.at(i * kept.size)))
