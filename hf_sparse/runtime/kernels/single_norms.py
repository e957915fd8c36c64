"""Norms and rotations of one token, whose features are lanes."""

from __future__ import annotations

from hf_sparse.runtime.kernels import normalisation, tiles
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import vector


def row_norm(target: Target, norm: str) -> Function:
    """LayerNorm or RMSNorm of vectors: as `normalisation.py`, with features as lanes.

    Arguments: x, y, features (any number), groups, weight, bias, epsilon.
    """
    f = normalisation.SIGNATURE.function(f"{norm}_norm_row", normalisation.norm_extents(norm, 4))
    x, y, features, groups, weight, bias, epsilon = f.parameters
    kind, lanes = vector(target.lanes), target.lanes
    zero, nothing = f.constant(0.0, kind), f.constant(0.0, "float")
    count = features.cast("uitofp", "float")
    whole = features / lanes * lanes
    with f.range(groups) as group:
        source, result = x.at(group * features * 4), y.at(group * features * 4)
        mean = nothing
        if norm == "layer":
            total, rest = f.variable(zero), f.variable(nothing)
            with f.range(whole, step=lanes) as i:
                total.set(total.get() + source.at(i * 4).load(kind, 4))
            with f.range(features, start=whole) as i:
                rest.set(rest.get() + source.at(i * 4).load("float"))
            mean = (f.total(total.get()) + rest.get()) / count
        squares, rest = f.variable(zero), f.variable(nothing)
        with f.range(whole, step=lanes) as i:
            value = source.at(i * 4).load(kind, 4) - mean.splat(lanes)
            squares.set(f.fma(value, value, squares.get()))
        with f.range(features, start=whole) as i:
            value = source.at(i * 4).load("float") - mean
            rest.set(f.fma(value, value, rest.get()))
        variance = (f.total(squares.get()) + rest.get()) / count
        inverse = f.constant(1.0, "float") / f.sqrt(variance + epsilon)
        with f.range(whole, step=lanes) as i:
            value = (source.at(i * 4).load(kind, 4) - mean.splat(lanes)) * inverse.splat(lanes)
            value = value * weight.at(i * 4).load(kind, 4)
            if norm == "layer":
                value = value + bias.at(i * 4).load(kind, 4)
            result.at(i * 4).store(value, 4)
        with f.range(features, start=whole) as i:
            value = (source.at(i * 4).load("float") - mean) * inverse
            value = value * weight.at(i * 4).load("float")
            if norm == "layer":
                value = value + bias.at(i * 4).load("float")
            result.at(i * 4).store(value)
    return f


def row_rotary() -> Function:
    """As `tiles.rotary`, for one token. Arguments: x, heads, head_dim, cos, sin."""
    f = tiles.ROTARY.function("rotary_row", tiles.rotary_extents(4))
    x, heads, head_dim, cos, sin = f.parameters
    half = head_dim / 2
    with f.range(heads) as head, f.range(half) as d:
        low = x.at((head * head_dim + d) * 4)
        high = low.at(half * 4)
        first, second = low.load("float"), high.load("float")
        factors = [
            table.at((d + offset) * 4).load("float")
            for table in (cos, sin)
            for offset in (f.constant(0, "i64"), half)
        ]
        cos_low, cos_high, sin_low, sin_high = factors
        low.store(first * cos_low - second * sin_low)
        high.store(f.fma(second, cos_high, first * sin_high))
    return f
