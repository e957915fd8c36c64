"""Rounding to a grid: the scales of a weight's groups, and the nearest codes."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.quantization.codes import Codes, lies_on, lowest_steps
from hf_sparse.quantization.grid import SMALLEST_SCALE, Grid

# The shares of the widest scale that a search tries: 1, 0.97, ..., 0.85. Smaller ones clip the largest
# weights so much that models lose by it, though the squared error of the weights is smaller.
_SHARES = tuple(1 - 0.03 * step for step in range(6))
# The same, of scales whose sign makes room for the largest weight at -8: from its place at 7 on.
_SHARES_WITH_SIGNS = (8 / 7, 1.105, 1.07, 1.035, *_SHARES)


def fitted_scales(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Tensor:
    """The scales with the least squared error after rounding to the nearest code.

    Tries the scale that holds a group's largest weight, and smaller ones that clip it.

    Args:
        weight: `(out_features, in_features)`, finite.
        grid: what to round to.
        importance: `(in_features,)`: the weight of each input's squared error, such as the mean square
            of its activations; None: all alike.

    Returns:
        `(out_features, groups)`, float32, each a positive bfloat16 of at least `SMALLEST_SCALE`.

    Raises:
        ValueError: the group size does not divide the inputs.
    """
    rows, columns = weight.shape
    size = grid.columns_per_scale(columns)
    grouped = weight.float().reshape(rows, -1, size)
    inputs = 1.0 if importance is None else importance.float().reshape(-1, size)
    widest = _widest(grouped, grid)
    best, least = widest, torch.full_like(widest, torch.inf)
    for share in _SHARES_WITH_SIGNS if grid.has_signs else _SHARES:
        scales = _rounded_up(widest * share)
        missed = _nearest(grouped, scales, grid).mul_(scales[..., None]).sub_(grouped)
        error = missed.square_().mul_(inputs).sum(-1)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def lowest_codes(weight: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """The lowest code of each group, `(out_features, groups)`, as floats; the highest follows from it.

    Args:
        weight: `(out_features, in_features)`; with zero points its lowest values tell them, with signs
            whether its largest weight is above zero.
        scales: of its groups, positive.
        grid: what it is to be rounded to.
    """
    if grid.symmetric and not grid.has_signs:
        return torch.full_like(scales, grid.lowest_code)
    grouped = weight.float().reshape(*scales.shape, -1)
    if grid.symmetric:
        return lowest_steps(grouped, grid)
    return -(-grouped.amin(-1) / scales).round_().clamp_(0, grid.highest_code)


def nearest_codes(weight: Tensor, scales: Tensor, grid: Grid) -> Codes:
    """The code nearest to each weight: `(out_features, in_features)`, with positive scales."""
    rows, groups = scales.shape
    steps = _nearest(weight.float().reshape(rows, groups, -1), scales, grid)
    return Codes.of_steps(steps.reshape(weight.shape), scales, grid)


def rounded(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Tensor:
    """The weight rounded to the grid, in its dtype; itself, if it lies on the grid. Zeros stay zeros.

    Memory: some copies of it.
    """
    if lies_on(weight, grid):
        return weight
    scales = fitted_scales(weight, grid, importance)
    return nearest_codes(weight, scales, grid).weight(weight.dtype)


def _widest(grouped: Tensor, grid: Grid) -> Tensor:
    """The scales that hold the largest weight of each group; of zeros 1."""
    highest, lowest = grouped.amax(-1).clamp_min(0), grouped.amin(-1).clamp_max(0)
    if grid.symmetric:
        scales = torch.maximum(highest, -lowest) / grid.largest_step
    else:
        scales = (highest - lowest) / (2**grid.bits - 1)
    return _rounded_up(torch.where(scales == 0, torch.ones_like(scales), scales))


def _rounded_up(scales: Tensor) -> Tensor:
    """The next bfloat16 at or above each scale."""
    bits = scales.clamp_min(SMALLEST_SCALE).float().contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32)


def _nearest(grouped: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """The codes `(rows, groups, size)`, as floats."""
    lowest = lowest_codes(grouped, scales, grid)[..., None]
    codes = (grouped / scales[..., None]).round_()
    return torch.clamp(codes, lowest, lowest + grid.span)
