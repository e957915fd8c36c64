"""The proxes of counts, in a metric, against a search over all ways to set weights to zero."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hf_sparse.optim import prox
from hf_sparse.patterns import NM, Pattern


def least(weight: Tensor, metric: Tensor, cost: float, may_stay: int) -> Tensor:
    """A group `(m,)` with any of its weights zero, of the least `1/2 d w^2` lost plus the cost.

    `cost` is paid by a group with more than `may_stay` nonzeros.
    """
    best, lowest = weight, float("inf")
    for kept in itertools.product((0.0, 1.0), repeat=len(weight)):
        mask = torch.tensor(kept)
        lost = 0.5 * float((metric * ((1 - mask) * weight).square()).sum())
        objective = lost + (cost if mask.sum() > may_stay else 0.0)
        if objective < lowest - 1e-9:
            best, lowest = weight * mask, objective
    return best


def random(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, 0.2 + torch.rand(rows, columns, generator=generator)


@pytest.mark.parametrize("own_metric", [False, True])
@pytest.mark.parametrize("tau", [0.0, 0.02, 0.1, 0.4, 3.0])
def test_a_group_loses_its_surplus_where_that_costs_less(tau: float, own_metric: bool) -> None:
    weight, metric = random(12, 8)
    metric = metric if own_metric else torch.ones_like(weight)
    pattern = Pattern.parse("2:4")
    assert isinstance(pattern, NM)
    found = weight.clone()
    prox.nm_hard_threshold_([found], tau, pattern, [metric] if own_metric else None)
    groups = zip(weight.view(-1, 4), metric.view(-1, 4), strict=True)
    wanted = torch.stack([least(w, d, 4 * tau, may_stay=2) for w, d in groups])
    assert torch.equal(found.view(-1, 4), wanted)


@pytest.mark.parametrize("own_metric", [False, True])
@pytest.mark.parametrize("tau", [0.0, 0.02, 0.1, 0.4, 3.0])
def test_a_block_goes_where_that_costs_less(tau: float, own_metric: bool) -> None:
    weight, metric = random(12, 4)
    metric = metric if own_metric else torch.ones_like(weight)
    found = weight.clone()
    prox.group_hard_threshold_(
        [found], tau, Pattern.parse("block:1x4"), [metric] if own_metric else None
    )
    wanted = torch.stack([least(w, d, 4 * tau, 0) for w, d in zip(weight, metric, strict=True)])
    assert torch.equal(found, wanted)
