"""Proximal operators: the shrinkage steps of sparse training.

    prox_{tau R}(w) = argmin_u  tau R(u) + 1/2 ||u - w||^2

| function               | R(w)                                     | convex |
|------------------------|------------------------------------------|--------|
| `soft_threshold_`      | sum_i |w_i|                              | yes    |
| `hard_threshold_`      | number of nonzeros                       | no     |
| `group_soft_threshold_`| sum_g sqrt(|g|) ||w_g||_2                | yes    |
| `group_hard_threshold_`| sum_g |g| [w_g != 0]                     | no     |
| `nm_hard_threshold_`   | M times the groups that break N:M        | no     |
| `nm_shrink_`           | sum over groups of M of e_{N+1}(|w|)     | no     |

With `tau_i` per weight the first two are the operators of `sum_i tau_i r(w_i)`. Everything works in
place on lists of weights, in fp32 for 16-bit weights; NaN stays NaN, zero stays zero.

Sources: soft and hard thresholds, group lasso: Parikh and Boyd, "Proximal Algorithms", 2014, and
Yuan and Lin, 2006. N:M: the regulariser of ProxSparse, https://arxiv.org/abs/2502.00258.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import Tensor

from hf_sparse.patterns import NM, GroupPattern
from hf_sparse.upstream.torch import (
    foreach_clamp_max,
    foreach_clamp_min_,
    foreach_neg,
    foreach_sub_,
    hardshrink_into,
    softshrink_into,
)

# A strength for all weights, or one tensor per weight tensor, broadcast against it.
Tau = float | Sequence[Tensor]

MAX_GROUP = 8
_SWEEPS = 60
_CHUNK = 1 << 16  # groups that stay in a CPU's cache
_GPU_CHUNK = 1 << 23  # groups that outweigh the launches of kernels


def soft_threshold_(weights: Sequence[Tensor], tau: Tau, *, foreach: bool = False) -> None:
    """`w <- sign(w) max(|w| - tau, 0)`, the prox of `tau ||w||_1`.

    Args:
        weights: any shapes, changed in place.
        tau: `>= 0`; one number, or a tensor per weight tensor.
        foreach: use multi-tensor kernels, which need a temporary copy of all weights. Faster on
            a GPU, slower on a CPU.
    """
    if foreach and all(map(_is_wide, weights)):
        foreach_sub_(list(weights), _foreach_clip(list(weights), tau))
    elif isinstance(tau, float | int):
        _each_(lambda w: softshrink_into(w, tau, out=w), weights)
    else:
        _each_(lambda w, t: w.sub_(w.clamp(-t, t)), weights, tau)


def hard_threshold_(
    weights: Sequence[Tensor], tau: float, metric: Sequence[Tensor] | None = None
) -> None:
    """`w <- w if 1/2 d w^2 > tau else 0`, the prox of `tau ||w||_0`.

    Args:
        weights: any shapes, changed in place.
        tau: `>= 0`.
        metric: `d > 0` of each weight, of its shape; None: 1, the Euclidean prox.
    """
    if metric is None:
        threshold = (2 * tau) ** 0.5
        _each_(lambda w: hardshrink_into(w, threshold, out=w), weights)
        return
    for weight, diagonal in zip(weights, metric, strict=True):
        wide = _wide(weight)
        weight.mul_((diagonal * wide).mul_(wide) > 2 * tau)


def group_soft_threshold_(weights: Sequence[Tensor], tau: float, pattern: GroupPattern) -> None:
    """`w_g <- w_g max(1 - tau sqrt(|g|) / ||w_g||_2, 0)`, the prox of the group lasso.

    Args:
        weights: `(out_features, in_features)` each, changed in place.
        tau: `>= 0`.
        pattern: what a group is.

    Raises:
        ValueError: the pattern cannot divide a weight.
    """

    def shrink_(weight: Tensor) -> None:
        height, width = pattern.group_shape(*weight.shape)
        norms = pattern.unit_scores(weight).sqrt()
        shrunk = (norms - tau * (height * width) ** 0.5).clamp_min(0)
        factors = shrunk / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        pattern.blocks(weight).mul_(factors[:, None, :, None])

    _each_(shrink_, weights)


def group_hard_threshold_(
    weights: Sequence[Tensor], tau: float, pattern: GroupPattern, metric: Sequence[Tensor] | None
) -> None:
    """`w_g <- w_g if 1/2 sum_g d_i w_i^2 > tau |g| else 0`, the prox of `tau |g| [w_g != 0]`.

    Args:
        weights: `(out_features, in_features)` each, changed in place.
        tau: `>= 0`.
        pattern: what a group is.
        metric: `d > 0` of each weight, of its shape; None: 1, the Euclidean prox.

    Raises:
        ValueError: the pattern cannot divide a weight.
    """
    for index, weight in enumerate(weights):
        height, width = pattern.group_shape(*weight.shape)
        squares = _wide(weight).square()
        losses = squares if metric is None else squares.mul_(metric[index])
        kept = pattern.blocks(losses).sum(dim=(1, 3)) > 2 * tau * height * width
        pattern.blocks(weight).mul_(kept[:, None, :, None])


def nm_hard_threshold_(
    weights: Sequence[Tensor], tau: float, pattern: NM, metric: Sequence[Tensor] | None
) -> None:
    """Prune the surplus of a group where that costs no more than `tau M`, or leave the group.

    The prox of `tau M [the group has more than N nonzeros]`: the cost of pruning is
    `1/2 sum d_i w_i^2` over the M - N lowest terms.

    Args:
        weights: `(out_features, in_features)` each, changed in place.
        tau: `>= 0`.
        pattern: N:M.
        metric: `d > 0` of each weight, of its shape; None: 1, the Euclidean prox.

    Raises:
        ValueError: M does not divide the rows.
    """
    for index, weight in enumerate(weights):
        squares = _wide(weight).square()
        losses = squares if metric is None else squares.mul_(metric[index])
        surplus = pattern.surplus(losses)
        lost = (pattern.groups(losses) * surplus).sum(dim=1, keepdim=True)
        weight.mul_((~surplus | (lost > 2 * tau * pattern.m)).view(weight.shape))


def nm_shrink_(weights: Sequence[Tensor], tau: float | Sequence[float], pattern: NM) -> None:
    """Shrink towards at most N nonzeros in each M: the prox of `tau e_{N+1}(|w|)` per group.

    `e_k` is the elementary symmetric polynomial: for 2:4 the sum of the four products of three.
    It is zero if and only if the group follows the pattern. Signs come off and the group is
    sorted, `z1 >= z2 >= ...`; for each number `s = N .. M` of weights that stay, coordinate
    descent solves

        u_i = max(z_i - tau e_N(the other s - 1), 0)

    from 0 upwards, smallest first, and the candidate of lowest objective wins, the sparser one of
    equals. Source: EnumALM of ProxSparse, for any N:M with M <= 8.

    Args:
        weights: `(out_features, in_features)` each, changed in place.
        tau: `>= 0`, one number or one for each weight. Relative to the size of the weights:
            `prox_tau(c z) = c prox_{tau c^(N-1)}(z)`.
        pattern: N:M.

    Memory: beside the weights about 20 times 65,536 groups, on a GPU 20 times 8 million, at most
    20 times the largest weight more.

    Raises:
        ValueError: M is over 8, or does not divide the rows.
    """
    if pattern.m > MAX_GROUP:
        raise ValueError(
            f"the N:M regulariser has {pattern.m} weights in a group of '{pattern}'; wanted at "
            f"most {MAX_GROUP}: its terms grow combinatorially. Use penalty='l0'."
        )
    taus = [tau] * len(weights) if isinstance(tau, float | int) else list(tau)
    if weights and weights[0].is_cuda:
        _shrink_joined_(weights, taus, pattern)
        return
    for weight, strength in zip(weights, taus, strict=True):
        groups = pattern.groups(weight)
        for chunk in groups.split(_CHUNK):
            _shrink_groups_(chunk, strength, pattern.n)
        if groups.data_ptr() != weight.data_ptr():  # a transposed weight was copied
            weight.copy_(groups.view(weight.shape))


def _shrink_joined_(weights: Sequence[Tensor], taus: Sequence[float], pattern: NM) -> None:
    """`nm_shrink_` on many weights at once."""
    for some, strengths in _joinable(weights, taus, pattern.m):
        groups = [pattern.groups(weight) for weight in some]
        sizes = [len(part) for part in groups]
        joined = torch.cat(groups)
        each = torch.tensor(strengths, device=joined.device).repeat_interleave(
            torch.tensor(sizes, device=joined.device), output_size=len(joined)
        )
        _shrink_groups_(joined, each, pattern.n)
        for weight, part in zip(some, joined.split(sizes), strict=True):
            weight.copy_(part.view(weight.shape))


def _joinable(
    weights: Sequence[Tensor], taus: Sequence[float], m: int
) -> Iterator[tuple[list[Tensor], list[float]]]:
    """Runs of weights of one dtype and of together about `_GPU_CHUNK` groups."""
    start, size = 0, 0
    for index, weight in enumerate(weights):
        size += weight.numel() // m
        following = weights[index + 1 : index + 2]
        if size >= _GPU_CHUNK or not following or following[0].dtype != weight.dtype:
            yield list(weights[start : index + 1]), list(taus[start : index + 1])
            start, size = index + 1, 0


def _shrink_groups_(groups: Tensor, tau: float | Tensor, n: int) -> None:
    """The prox of `tau e_{n+1}` for groups `(count, m)`, in place; `tau`: a number, or `(count,)`."""
    crowded = (groups != 0).sum(dim=1) > n  # the others are their own prox
    if crowded.all():
        groups.copy_(_nm_prox(groups.float(), tau, n))
        return
    some = tau if isinstance(tau, float | int) else tau[crowded]
    groups[crowded] = _nm_prox(groups[crowded].float(), some, n).to(groups.dtype)


def _nm_prox(groups: Tensor, tau: float | Tensor, n: int) -> Tensor:
    """The prox of `tau e_{n+1}` for groups `(count, m)`, fp32.

    One tensor per place in the group instead of an axis: everything, the sort too, is then
    elementwise over contiguous memory.
    """
    m = groups.shape[1]
    given = list(groups.T.abs().contiguous())
    z = _sorted(given)
    squares = [torch.zeros_like(z[0])]  # squares[-1 - k]: the sum of the k smallest
    for column in reversed(z):
        squares.append(torch.addcmul(squares[-1], column, column))
    best = [*z[:n], *(torch.zeros_like(z[0]) for _ in z[n:])]
    lowest = squares[m - n] / 2
    for size in range(n + 1, m + 1):
        u = _descend(z[:size], tau, n)
        value = squares[m - size].clone()
        for found, wanted in zip(u, z, strict=False):
            change = found - wanted
            value.addcmul_(change, change)
        value = _plus(value.mul_(0.5), _symmetric(u, n + 1), tau)
        better = (value < lowest).float()
        lowest = torch.minimum(lowest, value)
        u += [torch.zeros_like(value)] * (m - size)
        best = [torch.lerp(old, new, better) for old, new in zip(best, u, strict=True)]
    shrunk = torch.stack(_in_ranks_of(given, best), dim=1).copysign_(groups)
    return torch.where(groups.isnan().any(dim=1, keepdim=True), groups, shrunk)


def _sorted(columns: Sequence[Tensor]) -> list[Tensor]:
    """The values of each group in descending order, by exchanges of neighbours."""
    ordered = list(columns)
    for end in range(len(ordered) - 1, 0, -1):
        for i in range(end):
            pair = ordered[i : i + 2]
            ordered[i : i + 2] = torch.maximum(*pair), torch.minimum(*pair)
    return ordered


def _in_ranks_of(columns: Sequence[Tensor], ordered: Sequence[Tensor]) -> list[Tensor]:
    """Give each value of a group the one of `ordered` that has its rank; of equal ones in order."""
    ranks = [torch.zeros_like(column) for column in columns]
    for i, j in combinations(range(len(columns)), 2):
        first = (columns[i] >= columns[j]).float()
        ranks[j] += first
        ranks[i] += 1 - first
    placed = [torch.zeros_like(column) for column in columns]
    for rank, target in zip(ranks, placed, strict=True):
        for place, value in enumerate(ordered):
            target.addcmul_(value, (rank == place).float())
    return placed


def _descend(z: Sequence[Tensor], tau: float | Tensor, n: int) -> list[Tensor]:
    """Coordinate descent on `1/2 ||u - z||^2 + tau e_{n+1}(u)`, `u >= 0`; one tensor per place."""
    u = [torch.zeros_like(column) for column in z]
    for sweep in range(_SWEEPS):
        before = list(u) if sweep % 3 == 2 else None
        for i in reversed(range(len(u))):
            others = _symmetric(u[:i] + u[i + 1 :], n)
            u[i] = _plus(z[i], others, tau, sign=-1).clamp_min_(0)
        if before is not None and all(
            torch.allclose(new, old, rtol=1e-6, atol=1e-9)
            for new, old in zip(u, before, strict=True)
        ):
            break
    return u


def _plus(start: Tensor, more: Tensor, tau: float | Tensor, sign: int = 1) -> Tensor:
    """`start + sign * tau * more` in one kernel."""
    if isinstance(tau, Tensor):
        return torch.addcmul(start, more, tau, value=sign)
    return torch.add(start, more, alpha=sign * tau)


def _symmetric(values: Sequence[Tensor], degree: int) -> Tensor:
    """The elementary symmetric polynomial: the sum of the products of `degree` values."""
    if degree == 2:  # without the sum of all pairs: a b + (a + b) c + ...
        total, pairs = values[0], torch.zeros_like(values[0])
        for value in values[1:]:
            pairs = torch.addcmul(pairs, total, value)
            total = total + value
        return pairs
    total = torch.zeros_like(values[0])
    for chosen in combinations(values, degree):
        total += prod(chosen[1:], start=chosen[0])
    return total


def _is_wide(tensor: Tensor) -> bool:
    return tensor.element_size() >= 4


def _wide(tensor: Tensor) -> Tensor:
    """The tensor itself, or in fp32 if it has 16 bits or fewer."""
    return tensor if _is_wide(tensor) else tensor.float()


def _foreach_clip(weights: list[Tensor], tau: Tau) -> list[Tensor]:
    """The weights clipped to `[-tau, tau]`, as new tensors."""
    upper: Any = tau if isinstance(tau, float | int) else list(tau)
    lower: Any = -tau if isinstance(tau, float | int) else foreach_neg(upper)
    clipped = foreach_clamp_max(weights, upper)
    foreach_clamp_min_(clipped, lower)
    return list(clipped)


def _each_(
    operator: Callable[..., object], weights: Sequence[Tensor], *more: Sequence[Tensor]
) -> None:
    """Apply an in-place operator to each weight, in fp32; `more` gives it further tensors."""
    for weight, *others in zip(weights, *more, strict=True):
        wide = _wide(weight)
        operator(wide, *others)
        if wide is not weight:
            weight.copy_(wide)
