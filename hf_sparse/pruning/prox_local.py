"""The local sibling of ProxSparse: N:M masks learned by proximal gradient on each layer's own error.

    min 1/2 ||X (W - W₀)ᵀ||² + lam sum over groups of R(W)

with R of `hf_sparse.optim.prox.nm_shrink_`, which is zero exactly where the pattern holds. Inputs
are scaled to unit norm first, so that weights compare as their scores in Wanda do. lam grows until
the pattern holds. The mask is then applied to the original weights.

Sources: the regulariser, https://arxiv.org/abs/2502.00258; proximal gradient on a layer's error,
https://arxiv.org/abs/2501.18015. For models too big to be trained: it needs one layer at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.calibration.linalg import matmul
from hf_sparse.optim.prox import MAX_GROUP, nm_shrink_
from hf_sparse.patterns import NM, Pattern
from hf_sparse.pruning.problem import Problem, by_scores

_POWER_STEPS = 20


def check_learnable(method: str, pattern: Pattern) -> NM:
    """The pattern, if the N:M regulariser can be used on it.

    Raises:
        ValueError: no N:M pattern, or groups too long.
    """
    if not isinstance(pattern, NM) or pattern.m > MAX_GROUP:
        raise ValueError(
            f"method '{method}' learns N:M masks with M <= {MAX_GROUP}; the pattern is '{pattern}'. "
            "Use pattern '2:4', or another method."
        )
    return pattern


def solve(
    problem: Problem,
    *,
    lam: float = 1e-4,
    growth: float = 1.15,
    iterations: int = 60,
    damping: float = 0.01,
) -> list[Tensor]:
    """Learn a mask and apply it.

    Args:
        problem: with a Gram matrix.
        lam: strength of the regulariser at the first iteration, relative to the scaled weights'
            root mean square.
        growth: factor on it after each iteration.
        iterations: proximal gradient steps at most; they end when the pattern holds.
        damping: added to the diagonal of the scaled Gram matrix, which is 1.

    Returns:
        The original weights where the mask keeps them.

    Memory: four times the weights and twice the Gram matrix.

    Raises:
        ValueError: no N:M pattern.
    """
    pattern = check_learnable("prox_local", problem.pattern)
    gram, scale = problem.scaled_gram(damping)
    target = problem.joined * scale
    weights = target.clone()
    step = 1 / _largest_eigenvalue(gram)
    size = max(float(target.square().mean().sqrt()), torch.finfo(torch.float32).tiny)
    strength = lam / size ** (pattern.n - 1)
    for _ in range(iterations):
        weights.add_(matmul(target - weights, gram), alpha=step)
        nm_shrink_([weights], strength, pattern)
        strength *= growth
        if pattern.follows(weights):
            break
    return by_scores(problem, problem.split(weights.abs()))


def _largest_eigenvalue(gram: Tensor) -> float:
    """An upper estimate of the largest eigenvalue of a symmetric matrix, by power iteration."""
    vector = torch.ones(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(_POWER_STEPS):
        vector = gram @ (vector / vector.norm())
    return 1.05 * float(vector.norm())
