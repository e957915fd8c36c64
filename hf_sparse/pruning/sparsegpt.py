"""SparseGPT: what a pruned weight did is taken over by the weights behind it.

Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot", https://arxiv.org/abs/2301.00774.

With `Uᵀ U = H⁻¹`, `H` the damped Gram matrix of the inputs, columns are taken from the left. Pruning
`w_j` costs `(w_j / U_jj)²` and is compensated best by `w_k -= w_j U_jk / U_jj` for `k > j`. Masks are
chosen for 128 columns at a time, N:M group by group, on weights that hold all compensation so far.

Departures: counts are exact (rounded over the whole weight, not per 128 columns); inputs that are
always zero lose their weights before others are compared; a matrix that is not positive definite
gets more damping, and the report says so; whole groups that span columns are scored by the sum of
their costs, and those wider than 128 columns before anything is compensated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.calibration.linalg import inverse_factor, matmul
from hf_sparse.patterns import NM, Pattern
from hf_sparse.pruning.problem import Problem


def solve(problem: Problem, *, damping: float = 0.01, block_size: int = 128) -> list[Tensor]:
    """Prune and compensate.

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
    wanted = problem.damping(damping)
    factor, used = inverse_factor(problem.gram, wanted)
    problem.note_damping(wanted, used)
    weights = problem.joined
    columns, pattern = weights.shape[1], problem.pattern
    width = _block_width(pattern, problem.weights[0].shape, block_size)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        # Transposed: a column of the weight lies in one piece.
        block = weights[:, start:stop].T.contiguous()
        square = factor[start:stop, start:stop]
        costs = torch.where(problem.dead[start:stop], 0.0, 1 / square.diagonal())[:, None]
        errors = _prune_block(problem, block, square, costs, start)
        weights[:, start:stop] = block.T
        if stop < columns:
            weights[:, stop:] -= matmul(errors.T, factor[start:stop, stop:].T)
    return problem.split(weights)


def _block_width(pattern: Pattern, shape: torch.Size, block_size: int) -> int:
    """The columns whose mask is chosen together: whole groups."""
    height, width = pattern.group_shape(*shape)
    whole_columns = not pattern.elementwise and height == shape[0] and width == 1
    return shape[1] if whole_columns else -(-block_size // width) * width


def _prune_block(
    problem: Problem, block: Tensor, factor: Tensor, costs: Tensor, start: int
) -> Tensor:
    """Prune `block`, columns from `start` on, transposed, in place.

    Args:
        problem: what is pruned.
        block: `(width, rows)`.
        factor: the factor's rows and columns of the block, `(width, width)`.
        costs: square root of what pruning a weight of 1 costs, `(width, 1)`.
        start: number of the block's first column.

    Returns:
        `w_j / U_jj` of each pruned weight, 0 elsewhere, `(width, rows)`.
    """
    pattern = problem.pattern
    diagonal = factor.diagonal()[:, None]
    grouped = pattern if isinstance(pattern, NM) else None
    if grouped is None:
        pruned = _chosen(problem, block * costs, start)
    else:
        pruned = torch.empty_like(block, dtype=torch.bool)
    errors = torch.empty_like(block)
    for j, row in enumerate(block):
        if grouped is not None and j % grouped.m == 0:
            group = slice(j, j + grouped.m)
            scores = (block[group] * costs[group]).abs()
            pruned[group] = grouped.surplus(scores.T.contiguous()).view(-1, grouped.m).T
        torch.mul(row, pruned[j] / diagonal[j], out=errors[j])
        block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    block.masked_fill_(pruned, 0)
    return errors


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
