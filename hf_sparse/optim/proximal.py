"""SparseOptimizer's way to a target: the strength of the penalty follows the schedule.

Source: https://arxiv.org/abs/2306.15656; the control is ours.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_sparse.arguments import Bound
from hf_sparse.optim.parameters import (
    Group,
    SparseParameter,
    set_strength,
    sparse_groups,
    sparse_parameters,
    unit_strength,
)
from hf_sparse.optim.penalties import PENALTIES
from hf_sparse.optim.projection import project_, saliency
from hf_sparse.optim.sharding import processes_of
from hf_sparse.patterns import Pattern

# Distances that are enough to place a quantile: its standard error is below 0.05 % of the units.
_SAMPLE = 1 << 20
# The most that the strength of a gradual penalty changes at a time: too strong, and a share of the
# units becomes zero at once; too weak, and all zeros grow again.
_STEEPEST = 1.3


class Proximal:
    """The prox inside the optimizer's step, with `lam` set so that the sparsity follows.

    A gradual penalty (l1, group lasso, N:M) moves each unit by a known amount per step, so the
    strength that makes a share `s` of them zero within `n` steps can be read off the weights:
    `lam` is the `s`-quantile of the distances to zero, divided by `n`. What the gradient undoes
    shows in the next distances; and where the zeros lag behind, the aim is as much higher. For l0
    the quantile itself is the threshold.
    """

    bounds: ClassVar[dict[str, Bound]] = {}

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def approach(self, share: float, steps: int) -> None:
        groups = [group for group in sparse_groups(self._optimizer) if unit_strength(group)]
        if not groups:
            return  # warm-up begins with a rate of 0: nothing moves
        if groups[0]["scale"] == "adaptive" and not self._has_moments():
            return
        gradual = PENALTIES[groups[0]["penalty"]].gradual
        distances = self._distances(groups)
        due = groups[0].get("sparsity_due", 0.0)
        lag = max(due - self._mean((distances == 0).float().mean()), 0.0) if gradual else 0.0
        rank = round(min(share + 2 * lag, (1 + share) / 2) * distances.numel())
        lam = self._mean(distances.kthvalue(rank).values) if rank else 0.0
        if not math.isfinite(lam):
            raise ValueError(
                "the weights in training are NaN or infinite: lower the learning rate."
            )
        groups[0]["sparsity_due"] = share
        old = groups[0]["lam"] or 0.0
        if not gradual:
            lam = lam or old  # as many zeros as are due: the threshold that holds them stays
        else:
            lam /= steps
            lam = min(max(lam, old / _STEEPEST), old * _STEEPEST) if old else lam
        set_strength(self._optimizer, lam)

    def release(self) -> None:
        # One step without shrinkage moves every zero a little: a surplus of them can be undone.
        set_strength(self._optimizer, 0.0)

    def finish(self, share: float) -> None:
        project_(self._optimizer, share, saliency)

    def _has_moments(self) -> bool:
        """Whether Adam has taken a step: a GradScaler may have skipped all so far."""
        members = sparse_parameters(self._optimizer)
        return any(float(sparse.state.get("step", 0)) for sparse in members)

    @torch.no_grad()
    def _distances(self, groups: list[Group]) -> Tensor:
        """The distances to zero of the units, or of every n-th of them if they are many."""
        parameters = list(sparse_parameters(self._optimizer, groups))
        stride = max(sum(sparse.weight.numel() for sparse in parameters) // _SAMPLE, 1)
        return torch.cat([_distances(sparse, stride).reshape(-1) for sparse in parameters])

    def _mean(self, value: Tensor) -> float:
        """The mean of a number over the processes that hold shards."""
        processes = processes_of(sparse.parameter for sparse in sparse_parameters(self._optimizer))
        total = value.reshape(1).clone()
        processes.sum_(total)
        return float(total) / processes.size


def _distances(sparse: SparseParameter, stride: int) -> Tensor:
    """The distances to zero of the units in every `stride`-th row of units."""
    group, pattern = sparse.group, Pattern.parse(sparse.group["pattern"])
    shape = sparse.weight.shape
    units = torch.arange(shape[0], device=sparse.weight.device).view(-1, pattern.least_span(shape))
    rows = units[:: min(stride, max(len(units), 1))].reshape(-1)
    alpha = sparse.alpha(rows)
    unit: Any = unit_strength(group) if alpha is None else alpha.float() * unit_strength(group)
    return PENALTIES[group["penalty"]].distance(
        sparse.weight[rows], unit, sparse.metric(rows), pattern
    )
