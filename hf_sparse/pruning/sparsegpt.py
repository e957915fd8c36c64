"""SparseGPT: what a pruned weight did is taken over by the weights behind it.

Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot", https://arxiv.org/abs/2301.00774.

With `Uᵀ U = H⁻¹`, `H` the damped Gram matrix of the inputs, columns are taken from the left. Pruning
`w_j` costs `(w_j / U_jj)²` and is compensated best by `w_k -= w_j U_jk / U_jj` for `k > j`. Masks are
chosen for 128 columns at a time, N:M group by group, on weights that hold all compensation so far.

On a grid of few bits (the paper's "joint sparsification and quantization", which is GPTQ where nothing
is pruned, https://arxiv.org/abs/2210.17323) a kept `w_j` is rounded to `q_j` when its column is
reached, and `(w_j - q_j) / U_jj` is passed on as that of a pruned one is. The scales of a group of
columns are searched when the sweep reaches it, on the weights that are about to be kept, with
`1 / U_jj²` as the weight of each column's squared error; scales of whole rows before the sweep.

Departures: counts are exact (rounded over the whole weight, not per 128 columns); inputs that are
always zero lose their weights before others are compared; a matrix that is not positive definite
gets more damping, and the report says so; whole groups that span columns are scored by the sum of
their costs, and those wider than 128 columns before anything is compensated.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from hf_sparse.calibration.linalg import inverse_factor, matmul
from hf_sparse.patterns import NM, Pattern
from hf_sparse.pruning.problem import Problem
from hf_sparse.quantization import Grid, fitted_scales, lowest_codes

_DAMPING = 0.01
_BLOCK = 128


def solve(problem: Problem, *, damping: float = 0.01, block_size: int = 128) -> list[Tensor]:
    """Prune and compensate; of a problem with a grid also round.

    Args:
        problem: with a Gram matrix.
        damping: added to the Gram matrix's diagonal, as a share of its mean.
        block_size: columns whose mask is chosen together.

    Returns:
        The pruned weights.

    Memory: three times the weights and three times the Gram matrix.

    Raises:
        ValueError: the Gram matrix cannot be factorised.
    """
    return problem.split(_swept(problem, problem.joined, None, damping, block_size))


def rounded(problem: Problem, pruned: list[Tensor]) -> list[Tensor]:
    """Weights of a problem with a grid, rounded with error feedback (GPTQ); zeros stay zeros.

    Args:
        problem: with a Gram matrix.
        pruned: its weights, with the zeros that they are to have.

    Memory and errors: see `solve`.
    """
    weights = torch.cat(pruned)
    return problem.split(_swept(problem, weights, weights == 0, _DAMPING, _BLOCK))


def _swept(
    problem: Problem, weights: Tensor, zeros: Tensor | None, damping: float, block_size: int
) -> Tensor:
    """Take the columns from the left: prune or round each, and let those behind it make up.

    Args:
        problem: with a Gram matrix.
        weights: all of them, `(rows, columns)`; changed in place.
        zeros: those to prune, of that shape; None: the pattern chooses.
        damping, block_size: see `solve`.
    """
    wanted = problem.damping(damping)
    factor, used = inverse_factor(problem.gram, wanted)
    problem.note_damping(wanted, used)
    columns = weights.shape[1]
    shape = problem.weights[0].shape
    width = _block_width(problem.pattern, shape, block_size, problem.grid)
    sweep = _Sweep(problem, factor, zeros)
    sweep.start(weights)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        # Transposed: a column of the weight lies in one piece.
        block = weights[:, start:stop].T.contiguous()
        errors = sweep.prune(block, start)
        weights[:, start:stop] = block.T
        if stop < columns:
            weights[:, stop:] -= matmul(errors.T, factor[start:stop, stop:].T)
    return weights


def _block_width(
    pattern: Pattern, shape: torch.Size, block_size: int, grid: Grid | None = None
) -> int:
    """The columns whose mask is chosen together: whole groups of the pattern and of the grid."""
    height, width = pattern.group_shape(*shape)
    if not pattern.elementwise and height == shape[0] and width == 1:  # whole columns
        return shape[1]
    if grid is not None and grid.group_size is not None:
        width = math.lcm(width, grid.group_size)
    return -(-block_size // width) * width


class _Sweep:
    """What is known of a problem while its columns are taken from the left.

    Args:
        problem: what is pruned.
        factor: `U`.
        zeros: the weights to prune, `(rows, columns)`, if that is decided.
    """

    def __init__(self, problem: Problem, factor: Tensor, zeros: Tensor | None) -> None:
        self._problem, self._factor, self._zeros = problem, factor, zeros
        pattern = problem.pattern
        self._nm = pattern if isinstance(pattern, NM) and zeros is None else None
        # Square root of what pruning a weight of 1 costs.
        self._costs = torch.where(problem.dead, 0.0, 1 / factor.diagonal())[:, None]
        self._size = 0  # columns of a scale; 0: one scale a row
        self._scales: _Scales | None = None

    def start(self, weights: Tensor) -> None:
        """Before the first column; of a grid with a scale a row, find the scales."""
        grid = self._problem.grid
        if grid is None:
            return
        self._scales = _Scales(grid)
        self._size = grid.group_size or 0
        if not self._size:
            whole = weights.T
            self._scales.fit_(whole.masked_fill(self._likely(whole, 0), 0), self._costs)

    def prune(self, block: Tensor, start: int) -> Tensor:
        """Prune and round the columns from `start` on, `(width, rows)`, in place.

        Returns:
            `(w_j - q_j) / U_jj` of each weight, `(width, rows)`.
        """
        part = slice(start, start + len(block))
        factor, costs = self._factor[part, part], self._costs[part]
        diagonal = factor.diagonal()[:, None]
        grouped = self._nm
        pruned = self._likely(block, start) if grouped is None else torch.zeros_like(block).bool()
        errors = torch.empty_like(block)
        for j, row in enumerate(block):
            if self._size and j % self._size == 0:
                self._enter(block, pruned, start, j)
            if grouped is not None and j % grouped.m == 0:
                group = slice(j, j + grouped.m)
                pruned[group] = _surplus(grouped, block[group] * costs[group])
            if self._scales is None:
                torch.mul(row, pruned[j] / diagonal[j], out=errors[j])
            else:
                kept = self._scales.nearest(row).masked_fill_(pruned[j], 0)
                torch.sub(row, kept, out=errors[j]).div_(diagonal[j])
                row.copy_(kept)
            block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        block.masked_fill_(pruned, 0)
        return errors

    def _enter(self, block: Tensor, pruned: Tensor, start: int, j: int) -> None:
        """Find the scales of the group of columns from the `j`-th of a block on."""
        assert self._scales is not None
        group, nm = slice(j, j + self._size), self._nm
        own, zeros = block[group], pruned[group]
        if nm is not None:
            # Up to the ends of the pattern's groups: those before `j` are decided, the others likely.
            wide = slice(j // nm.m * nm.m, -(-min(group.stop, len(block)) // nm.m) * nm.m)
            part = slice(start + wide.start, start + wide.stop)
            likely = _surplus(nm, block[wide] * self._costs[part])
            zeros = likely[j - wide.start :][: self._size]
        columns = slice(start + j, start + j + self._size)
        self._scales.fit_(own.masked_fill(zeros, 0), self._costs[columns])

    def _likely(self, block: Tensor, start: int) -> Tensor:
        """The weights of a block to prune, `(width, rows)`, by the values that they have now."""
        part = slice(start, start + len(block))
        if self._zeros is not None:
            return self._zeros[:, part].T
        scaled = block * self._costs[part]
        if self._nm is not None:
            return _surplus(self._nm, scaled)
        return _chosen(self._problem, scaled, start)


class _Scales:
    """The scales of the columns that a sweep is in, one for each row."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._scales = self._lowest = torch.empty(0)

    def fit_(self, block: Tensor, costs: Tensor) -> None:
        """Search them for some columns `(width, rows)`, with the weights that go set to zero."""
        weight, grid = block.T.contiguous(), replace(self._grid, group_size=None)
        scales = fitted_scales(weight, grid, costs[:, 0].square())
        self._scales, self._lowest = scales[:, 0], lowest_codes(weight, scales, grid)[:, 0]

    def nearest(self, row: Tensor) -> Tensor:
        """The values of the grid nearest to a column of the weight, `(rows,)`."""
        codes = (row / self._scales).round_()
        highest = self._lowest + self._grid.span
        return torch.clamp(codes, self._lowest, highest).mul_(self._scales)


def _surplus(pattern: NM, scaled: Tensor) -> Tensor:
    """The weights that go, of whole groups of N:M: `(width, rows)`, for `w_j / U_jj`."""
    scores = scaled.abs().T.contiguous()
    return pattern.surplus(scores).view(scores.shape).T


def _chosen(problem: Problem, scaled: Tensor, start: int) -> Tensor:
    """The weights of a block to prune, `(width, rows)`, for `w_j / U_jj` of that shape.

    The counts of all blocks together are exact: each gets what rounding up to its end leaves.
    """
    width = len(scaled)
    masks = []
    for part, sparsity in zip(problem.split(scaled.T.abs()), problem.sparsities, strict=True):
        units = problem.pattern.num_units(*part.shape)
        before, upto = (round(sparsity * units * n / width) for n in (start, start + width))
        if upto - before < units:
            masks.append(~problem.pattern.keep(part, (upto - before) / units))
        else:
            masks.append(torch.ones_like(part, dtype=torch.bool))
    return torch.cat(masks).T
