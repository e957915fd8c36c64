"""LayerNorm and RMSNorm over the features of a tile's tokens.

    layer   y = (x - mean) / sqrt(variance + epsilon) * weight + bias
    rms     y = x / sqrt(mean(x^2) + epsilon) * weight

The features are rows, so a token's mean is a sum down a lane. Mean and variance take a pass each:
one pass with sums of squares would lose digits where the mean is large.

Arguments: x, y (they may be the same), features, groups, weight, bias, epsilon. `groups` times
`features` rows are normed group by group with the same weight (heads); usually there is one group.
"""

from __future__ import annotations

from collections.abc import Iterator

from hf_sparse.runtime.kernels.call import Signature, parameters
from hf_sparse.runtime.kernels.extents import Call, Extent, Extents
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, vector

NORMS = ("layer", "rms")
# Of this kernel and of the one for single tokens.
SIGNATURE = Signature(
    parameters("ptr x, ptr y, i64 features, i64 groups, ptr weight, ptr bias, float epsilon"),
    ("x", "y"),
)


def name(norm: str, vectors: int) -> str:
    """The symbol of the kernel for tiles of `vectors` vectors."""
    return f"{norm}_norm{vectors}"


def norm_extents(norm: str, row_bytes: int) -> Extents:
    """What a norm reads and writes, whose features have `row_bytes` bytes each."""

    def extents(call: Call) -> Iterator[Extent]:
        rows = call["groups"] * call["features"]
        yield call.reads("x", row_bytes * rows)
        yield call.writes("y", row_bytes * rows)
        for name in ("weight", "bias") if norm == "layer" else ("weight",):
            yield call.reads(name, 4 * call["features"] if rows else 0)

    return extents


def normalisation(target: Target, norm: str, vectors: int) -> Function:
    """The kernel for tiles `vectors` vectors wide."""
    f = SIGNATURE.function(name(norm, vectors), norm_extents(norm, 4 * target.lanes * vectors))
    x, y, features, groups, weight, bias, epsilon = f.parameters
    size, kind = 4 * target.lanes, vector(target.lanes)
    row_bytes = size * vectors
    count = features.cast("uitofp", "float").splat(target.lanes)
    small = epsilon.splat(target.lanes)
    zero = f.constant(0.0, kind)

    with f.range(groups) as group:
        first = group * features * row_bytes
        source, target_rows = x.at(first), y.at(first)

        def rows(i: Value, start: Value = source) -> list[Value]:
            row = start.at(i * row_bytes)
            return [row.at(v * size).load(kind, 4) for v in range(vectors)]

        means = [zero] * vectors
        if norm == "layer":
            sums = [f.variable(zero) for _ in range(vectors)]
            with f.range(features) as i:
                for total, value in zip(sums, rows(i), strict=True):
                    total.set(total.get() + value)
            means = [total.get() / count for total in sums]
        squares = [f.variable(zero) for _ in range(vectors)]
        with f.range(features) as i:
            for total, value, mean in zip(squares, rows(i), means, strict=True):
                centred = value - mean if norm == "layer" else value
                total.set(f.fma(centred, centred, total.get()))
        inverse = [f.constant(1.0, kind) / f.sqrt(total.get() / count + small) for total in squares]
        with f.range(features) as i:
            slope = weight.at(i * 4).load("float").splat(target.lanes)
            values = rows(i)
            row = target_rows.at(i * row_bytes)
            for v in range(vectors):
                if norm == "layer":
                    offset = bias.at(i * 4).load("float").splat(target.lanes)
                    result = f.fma((values[v] - means[v]) * inverse[v], slope, offset)
                else:
                    result = values[v] * inverse[v] * slope
                row.at(v * size).store(result, 4)
    return f
