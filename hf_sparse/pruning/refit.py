"""Refit: the columns that stay take over what those that go did, as far as they can.

With whole columns zero (patterns `column` and `head_in`: neurons and attention heads) all rows of a
weight keep the same inputs K, and the best values for them have a closed form. With the Gram matrix
`H = Xᵀ X` of the inputs, damped, and the dense weight W:

    Ŵ_K = argmin ||X Wᵀ - X_K Ŵ_Kᵀ||²  =  W H_:K (H_KK)⁻¹

One factorisation serves all rows. Source: ZipLM, https://arxiv.org/abs/2302.04089, which removes one
unit after another; here all that go are known, and go at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.calibration.linalg import cholesky, matmul
from hf_sparse.patterns import Pattern
from hf_sparse.pruning.problem import Problem

_DAMPING = 0.01


def check_pattern(pattern: Pattern) -> None:
    """Refuse patterns whose rows keep different inputs.

    Raises:
        ValueError: zeros are not whole columns.
    """
    if pattern.whole_columns:
        return
    raise ValueError(
        f"refine='refit' fits whole columns, and pattern '{pattern}' has other zeros. Use it with "
        "'column' or 'head'; elsewhere the methods 'sparsegpt' and 'alps' update what stays."
    )


def refine(problem: Problem, pruned: list[Tensor]) -> list[Tensor]:
    """Fit the columns that are not zero to the dense layer's outputs, on the calibration data.

    Args:
        problem: with a Gram matrix.
        pruned: weights with the pattern.

    Returns:
        Weights with the same zeros.

    Memory: twice the Gram matrix.
    """
    check_pattern(problem.pattern)
    return [
        _fitted(problem, dense, weight)
        for dense, weight in zip(problem.weights, pruned, strict=True)
    ]


def _fitted(problem: Problem, dense: Tensor, pruned: Tensor) -> Tensor:
    kept = (pruned != 0).any(dim=0) & ~problem.dead
    gram = problem.gram
    wanted = problem.damping(_DAMPING)
    factor, used = cholesky(gram[kept][:, kept], wanted)
    problem.note_damping(wanted, used)
    # Damping pulls towards the dense weights, so that with all columns kept nothing changes.
    lost = dense.clone()
    lost[:, kept] = 0
    change = torch.cholesky_solve(matmul(gram[kept], lost), factor)
    fitted = pruned.clone()
    fitted[:, kept] = dense[:, kept] + change.T
    return fitted
