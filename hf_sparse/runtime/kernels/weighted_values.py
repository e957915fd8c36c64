"""The second half of one query's attention: softmax over its scores, and the mean of the values."""

from __future__ import annotations

from hf_sparse.runtime.kernels.activation import exponential
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, Variable, vector


def weighted_values(
    f: Function,
    target: Target,
    scores: Value,
    largest: Variable,
    tiles: tuple[Value, Value, Value],
    rows: tuple[Value, Value],
    out: Value,
) -> None:
    """Write the mean of the values, weighted by the softmax of the scores.

    Args:
        f: the kernel.
        target: what the code is for.
        scores: a float for each key of all tiles; they become `e^(score - largest)`.
        largest: lane by lane, the largest scores.
        tiles: the table of tiles, how many there are, and the tokens in each.
        rows: the first feature of the values in a tile, and how many features there are.
        out: as many floats.
    """
    lanes, kind = target.lanes, vector(target.lanes)
    table, key_tiles, width = tiles
    first, head_dim = rows
    zero = f.constant(0.0, kind)
    top = f.largest(largest.get()).splat(lanes)
    weights = f.variable(zero)
    with f.range(key_tiles * width, step=lanes) as j:
        place = scores.at(j * 4)
        weight = exponential(f, target, place.load(kind, 4) - top)
        place.store(weight, 4)
        weights.set(weights.get() + weight)
    inverse = f.constant(1.0, "float") / f.total(weights.get())
    with f.range(head_dim) as d:
        total = f.variable(zero)
        with f.range(key_tiles) as tile:
            described = table.at(tile * 24)
            stride = described.at(8).load("i64")
            row = described.load("ptr").at((first + d) * stride)
            with f.range(width, step=lanes) as j:
                weight = scores.at((tile * width + j) * 4).load(kind, 4)
                total.set(f.fma(weight, row.at(j * 4).load(kind, 4), total.get()))
        out.at(d * 4).store(f.total(total.get()) * inverse)
