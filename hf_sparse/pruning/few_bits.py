"""Rounding the kept weights of layers to a grid, so that their outputs change little.

1. The columns are taken from the left, each is rounded, and those behind it make up for it: GPTQ
   (Frantar et al., https://arxiv.org/abs/2210.17323), which is SparseGPT on zeros that are known
   (`sparsegpt.rounded`). SparseGPT itself does this in the sweep that prunes.
2. Coordinate descent on `||X (W - Q)ᵀ||²`, as in QuantEase (https://arxiv.org/abs/2309.01885). With
   `G = (W - Q) H` the best value of one weight is `q_j + G_j / H_jj`, and its nearest code the best
   one; then each scale `s` of a group with codes `c` gets its least squares,

       s + (G c) / (cᵀ H c)

   rounded to bfloat16. No step raises the error. `W` is the dense weight: so the kept weights also
   make up for those that were pruned.

Layers that saw no data, or only the norms of their inputs, are rounded to the nearest codes, with
scales searched for the least error that is known.

Departures from QuantEase: the scales are fitted, too; the diagonal of the matrix is damped in
proportion, as in ALPS, whose large weights of small inputs would be drawn to the dense ones otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_sparse.calibration.linalg import matmul, regularised
from hf_sparse.patterns import Unstructured
from hf_sparse.pruning import sparsegpt
from hf_sparse.pruning.problem import Notes, Problem
from hf_sparse.quantization import SMALLEST_SCALE, Codes, Grid, codes_of, lowest_steps
from hf_sparse.quantization import rounded as nearest
from hf_sparse.structure.grids import Gridded, is_on_grid

_DAMPING = 0.01
_BLOCK = 128
_SWEEPS = 3


def rounded(problem: Problem, pruned: list[Tensor], *, is_rounded: bool = False) -> list[Tensor]:
    """The pruned weights of a problem on its grid; zeros stay zeros.

    Args:
        problem: with a grid, and a Gram matrix or norms.
        pruned: its weights, with their zeros.
        is_rounded: whether they lie on the grid already, and only descend.

    Memory: with a Gram matrix six times the weights and three times the matrix.
    """
    grid = problem.grid
    assert grid is not None
    if not problem.tokens:
        return pruned if is_rounded else [nearest(weight, grid) for weight in pruned]
    if problem.statistic.ndim == 1:
        return [nearest(weight, grid, problem.statistic.square()) for weight in pruned]
    problem = replace(problem, pattern=Unstructured())  # the zeros are known
    if not is_rounded:
        pruned = sparsegpt.rounded(problem, pruned)
    return descended(problem, pruned)


def relative_error(problem: Problem, weights: list[Tensor]) -> list[float]:
    """`||X (W - Q)ᵀ||² / ||X Wᵀ||²` of each weight; with norms alone as if inputs were uncorrelated."""

    def size(values: Tensor) -> float:
        if problem.statistic.ndim == 1:
            return float((values * problem.statistic).square().sum())
        return float((matmul(values, problem.gram) * values).sum())

    pairs = zip(problem.weights, weights, strict=True)
    return [size(dense - found) / (size(dense) or 1.0) for dense, found in pairs]


def round_nearest_(layers: Iterable[Gridded], notes: Notes | None = None) -> None:
    """Round weights to the nearest codes of their grids, in place, but for those that are on them.

    Args:
        layers: weights and grids.
        notes: told of the error of each weight, `|W - Q|² / |W|²`.

    Memory: some copies of the largest weight.
    """
    for layer, grid in layers:
        weight, error = layer.weight, 0.0
        if not is_on_grid(layer, grid):
            found = nearest(weight, grid)
            lost = float((found.float() - weight.float()).square().sum())
            error = lost / (float(weight.float().square().sum()) or 1.0)
            weight.copy_(found)
        if notes is not None:
            notes.errors[layer.name] = error


def descended(problem: Problem, start: list[Tensor], sweeps: int = _SWEEPS) -> list[Tensor]:
    """Coordinate descent on codes and scales, from weights on the grid; zeros stay zeros.

    Args:
        problem: with a grid and a Gram matrix.
        start: weights on the grid.
        sweeps: over all codes, and over all scales.
    """
    grid = problem.grid
    assert grid is not None
    gram = damped(problem)
    point = _Point.of([codes_of(weight, grid) for weight in start], grid)
    dense = problem.joined
    for _ in range(sweeps):
        _move_codes(point, dense, gram)
        _move_scales(point, dense, gram)
    return problem.split(point.weights)


def damped(problem: Problem) -> Tensor:
    """The Gram matrix of a problem, each place of its diagonal a little larger."""
    gram = regularised(problem.gram, 0.0)
    gram.diagonal().mul_(1 + problem.damping(_DAMPING))
    return gram


@dataclass
class _Point:
    """Weights on a grid, `(rows, columns)`, that are changed in place.

    Attributes:
        weights: `scales * codes`.
        scales: `(rows, groups)`.
        lowest: the lowest code of each group.
        span: from there to the highest one.
        kept: which weights may change.
    """

    weights: Tensor
    scales: Tensor
    lowest: Tensor
    span: int
    kept: Tensor

    @classmethod
    def of(cls, parts: list[Codes], grid: Grid) -> _Point:
        """The weights that codes of layers with the same inputs mean."""
        apart = [part.steps() for part in parts]
        steps = torch.cat([part.codes for part in apart])
        scales = torch.cat([part.scales for part in apart])
        lowest = lowest_steps(steps.view(*scales.shape, -1).float(), grid)
        return cls(Codes(steps, scales).weight(), scales, lowest, grid.span, steps != 0)

    @property
    def size(self) -> int:
        """Columns that share a scale."""
        return self.weights.shape[1] // self.scales.shape[1]


def _move_codes(point: _Point, dense: Tensor, gram: Tensor) -> None:
    """Give each weight its best code, one column after the other."""
    weights, columns = point.weights, point.weights.shape[1]
    slope = matmul(dense - weights, gram)
    for start in range(0, columns, _BLOCK):
        part = slice(start, min(start + _BLOCK, columns))
        square = gram[part, part]
        # Transposed: a column of the weight lies in one piece.
        block, pull = weights[:, part].T.contiguous(), slope[:, part].T.contiguous()
        kept = point.kept[:, part].T.to(block.dtype)
        before = block.clone()
        for j, row in enumerate(block):
            group = (start + j) // point.size
            scales, lowest = point.scales[:, group], point.lowest[:, group]
            best = torch.add(row, pull[j], alpha=1 / float(square[j, j])).div_(scales).round_()
            best = torch.clamp(best, lowest, lowest + point.span).mul_(scales).mul_(kept[j])
            pull.addr_(square[j], best - row, alpha=-1)
            row.copy_(best)
        weights[:, part] = block.T
        slope -= matmul((block - before).T, gram[:, part])


def _move_scales(point: _Point, dense: Tensor, gram: Tensor) -> None:
    """Give each scale its least squares, one group of columns after the other."""
    slope = matmul(dense - point.weights, gram)
    for group in range(point.scales.shape[1]):
        part = slice(group * point.size, (group + 1) * point.size)
        scales = point.scales[:, group]
        codes = point.weights[:, part] / scales[:, None]
        curve = (matmul(codes, gram[part, part]) * codes).sum(1)
        wanted = (slope[:, part] * codes).sum(1) / curve.clamp_min(torch.finfo(curve.dtype).tiny)
        moved = (scales + wanted).bfloat16().float() - scales
        # What bfloat16 made of the step must still lower the error, and leave a scale that files hold.
        lowers = (moved * wanted > 0) & (moved.abs() < 2 * wanted.abs())
        moved = moved * (lowers & (scales + moved >= SMALLEST_SCALE))
        point.scales[:, group] += moved
        change = moved[:, None] * codes
        point.weights[:, part] += change
        slope -= matmul(change, gram[:, part])
