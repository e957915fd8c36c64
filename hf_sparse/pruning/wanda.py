"""Wanda: weights that are small on small inputs go.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
https://arxiv.org/abs/2306.11695.

    score_ij = |W_ij| * ||X_j||_2

compared within each output row (each group of N:M, each row of blocks); no weight is updated.
Departures: the norms are summed in fp64 over all tokens, and tokens that the attention mask leaves
out do not count; whole groups are scored by their sum of squared scores.
"""

from __future__ import annotations

from torch import Tensor

from hf_sparse.patterns import Pattern
from hf_sparse.pruning.problem import Problem


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """`|W_ij| ||X_j||`, fp32, for weights `(out_features, in_features)` and norms `(in_features,)`."""
    return weight.abs().float() * norms.float()


def wanda_mask(weight: Tensor, norms: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """The weights to keep.

    Args:
        weight: `(out_features, in_features)`.
        norms: L2 norm of each input feature over the calibration tokens, `(in_features,)`.
        pattern: the pattern.
        sparsity: fraction of zeros.

    Returns:
        Boolean mask of the weight's shape.
    """
    return pattern.keep(wanda_scores(weight, norms), sparsity, per_row=True)


def solve(problem: Problem) -> list[Tensor]:
    """Zero the weights of lowest score in each layer of a problem."""
    return [
        weight * wanda_mask(weight, problem.norms, problem.pattern, sparsity)
        for weight, sparsity in zip(problem.weights, problem.sparsities, strict=True)
    ]
