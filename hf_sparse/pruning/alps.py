"""ALPS: layers pruned by ADMM on their squared error, then refitted on the zeros found.

Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large
Language Models", https://arxiv.org/abs/2406.07831.

    min ||X (W - Ŵ)ᵀ||²  so that Ŵ has the pattern

Inputs are scaled to unit norm, so that H has a unit diagonal. ADMM splits Ŵ into W, which fits the
outputs, and D, which has the pattern:

    W <- (G - V + rho D) (H + rho I)⁻¹      G = W₀ H
    D <- the pattern's projection of W + V / rho
    V <- V + rho (W - D)

rho grows as the zeros settle. One eigendecomposition of H makes every rho cheap. On the zeros of the
last D the weights are then fitted by conjugate gradients (`refit`).

Departures: the threshold of an unstructured projection is estimated on a sample of the weights
until the last one, which is exact; the layers that share their inputs are solved together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.calibration.linalg import matmul
from hf_sparse.patterns import Pattern
from hf_sparse.pruning.problem import Problem

_SAMPLE = 1 << 15
_EVERY = 3  # iterations between two looks at the zeros


def solve(
    problem: Problem, *, damping: float = 0.01, iterations: int = 300, refit_steps: int = 10
) -> list[Tensor]:
    """Prune and refit.

    Args:
        problem: with a Gram matrix.
        damping: added to the diagonal of the scaled Gram matrix, which is 1.
        iterations: of ADMM, at most; it ends when the zeros no longer change.
        refit_steps: of conjugate gradients on the zeros found.

    Returns:
        The pruned weights.

    Memory: six times the weights and four times the Gram matrix.
    """
    gram, scale = problem.scaled_gram(damping)
    dense, dead = problem.joined, problem.dead
    weights = (dense * scale).masked_fill_(dead, 0)
    split = _admm(problem, weights, gram, iterations)
    mask = torch.cat(problem.keep(problem.split(split.abs())))
    fitted = refit(split * mask, mask, weights, gram, refit_steps)
    return problem.split(torch.where(dead, dense * mask, fitted / scale))


def _admm(problem: Problem, weights: Tensor, gram: Tensor, iterations: int) -> Tensor:
    """`W + V / rho` of the last iteration, whose projection has the pattern; `(rows, columns)`."""
    values, vectors = torch.linalg.eigh(gram)
    turned = vectors.T.contiguous()
    goal = matmul(weights, gram)
    dual = torch.zeros_like(weights)
    split = weights
    rho, kept, before = 0.1, weights, None
    for iteration in range(1, iterations + 1):
        right = torch.add(goal, kept, alpha=rho).sub_(dual)
        fitted = matmul(matmul(right, turned).div_(values + rho), vectors)
        split = torch.add(fitted, dual, alpha=1 / rho)
        kept = _projected(problem, split)
        dual.add_(fitted, alpha=rho).sub_(kept, alpha=rho)
        if iteration % _EVERY:
            continue
        mask = kept != 0
        if before is not None:
            changed = int((mask != before).sum()) / 2
            share = changed / max(int(mask.sum()), 1)
            if not changed:
                break
            rho *= 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
        before = mask
    return split


def _projected(problem: Problem, joined: Tensor) -> Tensor:
    """The nearest weights with the pattern, nearly: see `_quick_mask`."""
    parts = zip(problem.split(joined), problem.sparsities, strict=True)
    return torch.cat(
        [part * _quick_mask(part.abs(), problem.pattern, sparsity) for part, sparsity in parts]
    )


def _quick_mask(scores: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """`pattern.keep`; unstructured with a threshold from a sample, up to 0.3 % off in the count."""
    if not pattern.elementwise or scores.numel() <= 2 * _SAMPLE:
        return pattern.keep(scores, sparsity)
    stride = scores.numel() // _SAMPLE | 1  # odd, so that it meets all columns
    sample = scores.reshape(-1)[::stride]
    return scores > sample.kthvalue(max(round(sparsity * len(sample)), 1)).values


def refit(start: Tensor, mask: Tensor, target: Tensor, gram: Tensor, steps: int) -> Tensor:
    """Minimise `||X (target - W)ᵀ||²` over the weights of a mask, by conjugate gradients.

    All rows at once, each with its own step lengths, preconditioned by the diagonal.

    Args:
        start: first guess, zero outside the mask, `(out_features, in_features)`.
        mask: of the weights that may be nonzero.
        target: dense weights.
        gram: of the inputs, positive definite.
        steps: of conjugate gradients; the error falls with each.

    Returns:
        The fitted weights, zero outside the mask.
    """
    weights = start.clone()
    inverse = mask / gram.diagonal()
    residual = matmul(target - weights, gram).mul_(mask)
    direction = residual * inverse
    slope = (residual * direction).sum(dim=1, keepdim=True)
    tiny = torch.finfo(weights.dtype).tiny
    for _ in range(steps):
        image = matmul(direction, gram).mul_(mask)
        curvature = (direction * image).sum(dim=1, keepdim=True)
        length = slope / curvature.clamp_min(tiny)
        weights.addcmul_(direction, length)
        residual.addcmul_(image, length, value=-1)
        scaled = residual * inverse
        next_slope = (residual * scaled).sum(dim=1, keepdim=True)
        direction = scaled.addcmul_(direction, next_slope / slope.clamp_min(tiny))
        slope = next_slope
    return weights
