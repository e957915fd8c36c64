"""SparseSwaps: a pruned weight comes back and a kept one goes, wherever that lowers the error.

Source: "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale",
https://arxiv.org/abs/2512.10922.

Rows of a weight are independent in `||X (W - Ŵ)ᵀ||²`. With `G = (W - Ŵ) H`, taking the kept value
`v_p` away and giving `δ_q` to a pruned place changes a row's error by exactly

    2 v_p G_p + v_p² H_pp  -  2 δ_q (G_q + v_p H_pq)  +  δ_q² H_qq

Methods that keep weights as they are get `δ_q = w_q`. Those that update weights get the best value
`δ_q = (G_q + v_p H_pq) / H_qq`, and conjugate gradients on the new zeros at the end.

Unstructured: each row takes its best swap among the 16 x 16 most promising pairs, all rows at once,
again and again. N:M: the groups are taken from left to right, each takes its best swap of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.calibration.linalg import matmul, regularised
from hf_sparse.patterns import NM, Pattern, Unstructured
from hf_sparse.pruning.alps import refit
from hf_sparse.pruning.problem import Problem

_CANDIDATES = 16
_DAMPING = 0.01
_REFIT_STEPS = 10


def check_pattern(pattern: Pattern) -> None:
    """Refuse patterns whose weights cannot be swapped one by one.

    Raises:
        ValueError: neither unstructured nor N:M.
    """
    if not isinstance(pattern, Unstructured | NM):
        raise ValueError(
            f"refine='swaps' exchanges single weights, which pattern '{pattern}' does not allow. "
            "Use it with 'unstructured' or N:M, or leave it out."
        )


def refine(
    problem: Problem, pruned: list[Tensor], *, updates: bool, rounds: int = 50
) -> list[Tensor]:
    """Swap weights until no swap helps, or for so many rounds.

    Args:
        problem: with a Gram matrix.
        pruned: weights with the pattern.
        updates: whether the values of kept weights may change.
        rounds: swaps of each row; for N:M passes over the groups, a 16th of it.

    Returns:
        New weights with as many zeros in each row, of an error that is not larger (with
        `updates`: on the damped Gram matrix).

    Memory: six times the weights.
    """
    check_pattern(problem.pattern)
    gram = regularised(problem.gram, _DAMPING if updates else 0.0)
    dense, current = problem.joined, torch.cat(pruned)
    if isinstance(problem.pattern, NM):
        swapped = _swap_groups(dense, current, gram, problem.pattern, updates, -(-rounds // 16))
    else:
        swapped = _swap_rows(dense, current, gram, updates, rounds)
    if updates:
        swapped = refit(swapped, swapped != 0, dense, gram, _REFIT_STEPS)
    return problem.split(swapped)


def _swap_rows(dense: Tensor, current: Tensor, gram: Tensor, updates: bool, rounds: int) -> Tensor:
    current = current.clone()
    rows = torch.arange(len(current), device=current.device)
    gradient = matmul(dense - current, gram)
    diagonal = gram.diagonal()
    count = min(_CANDIDATES, current.shape[1] // 2)
    for _ in range(rounds):
        if not len(rows):
            break
        value, slope = current[rows], gradient[rows]
        removal = (2 * slope + value * diagonal) * value
        given = slope / diagonal if updates else dense[rows]
        arrival = (given * diagonal - 2 * slope) * given
        removal.masked_fill_(value == 0, torch.inf)
        arrival.masked_fill_((value != 0) | (given == 0), torch.inf)
        leaving = removal.topk(count, largest=False)
        coming = arrival.topk(count, largest=False)
        p, q = leaving.indices[:, :, None], coming.indices[:, None, :]
        v = value.gather(1, leaving.indices)[:, :, None]
        pull = slope.gather(1, coming.indices)[:, None, :] + v * gram[p, q]
        delta = pull / diagonal[q] if updates else given.gather(1, coming.indices)[:, None, :]
        change = leaving.values[:, :, None] + (delta * diagonal[q] - 2 * pull) * delta
        change = torch.where(coming.values[:, None, :].isinf(), torch.inf, change)
        best, pair = change.flatten(1).min(dim=1)
        scale = (slope * (dense[rows] - value)).sum(dim=1).abs()
        better = best < -1e-6 * scale
        rows, pair = rows[better], pair[better]
        p = leaving.indices[better].gather(1, (pair // count)[:, None])[:, 0]
        q = coming.indices[better].gather(1, (pair % count)[:, None])[:, 0]
        gone = current[rows, p]
        come = delta.expand(-1, count, -1)[better].flatten(1).gather(1, pair[:, None])[:, 0]
        gradient[rows] += gone[:, None] * gram[p] - come[:, None] * gram[q]
        current[rows, p] = 0
        current[rows, q] = come
    return current


def _swap_groups(
    dense: Tensor, current: Tensor, gram: Tensor, pattern: NM, updates: bool, rounds: int
) -> Tensor:
    current = current.clone()
    gradient = matmul(dense - current, gram)
    m = pattern.m
    for _ in range(rounds):
        improved = False
        for start in range(0, current.shape[1], m):
            inside = slice(start, start + m)
            square = gram[inside, inside]
            diagonal = square.diagonal()
            value, slope = current[:, inside], gradient[:, inside]
            v = value[:, :, None]  # the pair p, q is in the place (row, p, q)
            pull = slope[:, None, :] + v * square
            delta = pull / diagonal if updates else dense[:, inside][:, None, :].expand_as(pull)
            change = (2 * slope[:, :, None] + v * diagonal[:, None]) * v
            change = change + (delta * diagonal - 2 * pull) * delta
            allowed = (v != 0) & (value[:, None, :] == 0) & (delta != 0)
            change = torch.where(allowed, change, torch.inf).flatten(1)
            best, pair = change.min(dim=1)
            scale = (slope * (dense[:, inside] - value)).abs().sum(dim=1)
            better = best < -1e-6 * scale
            if not better.any():
                continue
            improved = True
            rows = better.nonzero()[:, 0]
            p, q = pair[rows] // m, pair[rows] % m
            moved = torch.zeros_like(value)
            moved[rows, p] = -value[rows, p]
            moved[rows, q] = delta[rows, p, q]
            gradient -= matmul(moved, gram[:, inside])
            current[:, inside] += moved
        if not improved:
            break
    return current
