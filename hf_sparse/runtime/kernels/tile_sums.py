"""Sums of some rows of a tile in registers: how many vectors, how they begin, and where they go."""

from __future__ import annotations

from collections.abc import Sequence

from hf_sparse.runtime.kernels import spmm
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, Variable, vector

# For each row, its sums: a variable for each vector.
Sums = list[list[Variable]]


def begun_sums(
    f: Function,
    target: Target,
    start: Value,
    bias: Value,
    row: Value,
    outputs: Sequence[Value],
    first: int,
    width: int,
) -> Sums:
    """Begin the sums of rows with what is in Y and in the bias.

    Args:
        f, target: the kernel.
        start: what to begin with, `START_*` of `spmm.py`.
        bias: of all rows.
        row: the number of the first one.
        outputs: where each row of Y is.
        first, width: the vectors of the tile.
    """
    size, kind = 4 * target.lanes, vector(target.lanes)
    zero = f.constant(0.0, kind)
    sums = [[f.variable(zero) for _ in range(width)] for _ in outputs]
    for mode in f.cases(start, 3):
        for number, (output, totals) in enumerate(zip(outputs, sums, strict=True)):
            for v, total in enumerate(totals):
                value = zero
                if mode in (spmm.START_SUM, spmm.START_SUM_BIAS):
                    value = output.at(size * (first + v)).load(kind, size)
                if mode in (spmm.START_BIAS, spmm.START_SUM_BIAS):
                    added = bias.at(row * 4 + 4 * number).load("float")
                    value = value + added.splat(target.lanes)
                total.set(value)
    return sums


def store_sums(target: Target, outputs: Sequence[Value], sums: Sums, first: int) -> None:
    """Write the sums of rows to Y, vectors `first ..` of the tile."""
    size = 4 * target.lanes
    for output, totals in zip(outputs, sums, strict=True):
        for v, total in enumerate(totals):
            output.at(size * (first + v)).store(total.get(), size)
