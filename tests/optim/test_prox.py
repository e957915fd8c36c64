"""Proximal operators against their definition: no other point has a lower objective."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_sparse.optim import prox
from hf_sparse.patterns import NM, GroupPattern, Pattern
from tests.support.crosses import cross

BLOCKS = ("block:4x1", "block:2x2", "row", "column", "head:4")
Regulariser = Callable[[Tensor], Tensor]


def group_sizes(pattern: GroupPattern, weight: Tensor) -> Tensor:
    return pattern.blocks(weight).square().sum(dim=(1, 3)).sqrt()


def regularisers(notation: str) -> tuple[Callable[[Tensor, float], Tensor], Regulariser]:
    """An operator out of place, and the function it is the prox of."""
    kind, _, pattern = notation.partition(" ")

    def apply(weight: Tensor, tau: float) -> Tensor:
        out = weight.clone()
        parsed = Pattern.parse(pattern) if pattern else None
        if kind == "l1":
            prox.soft_threshold_([out], tau)
        elif kind == "l0":
            prox.hard_threshold_([out], tau)
        elif kind == "group":
            prox.group_soft_threshold_([out], tau, parsed)
        elif kind == "group-l0":
            prox.group_hard_threshold_([out], tau, parsed, None)
        elif kind == "nm-l0":
            prox.nm_hard_threshold_([out], tau, parsed, None)
        else:
            prox.nm_shrink_([out], tau, parsed)
        return out

    def value(weight: Tensor) -> Tensor:
        if kind == "l1":
            return weight.abs().sum()
        if kind == "l0":
            return (weight != 0).sum().to(weight.dtype)
        parsed = Pattern.parse(pattern)
        if isinstance(parsed, GroupPattern):
            height, width = parsed.group_shape(*weight.shape)
            size = height * width
            norms = group_sizes(parsed, weight)
            return (norms * size**0.5).sum() if kind == "group" else (norms != 0).sum() * size
        groups = parsed.groups(weight).abs()
        if kind == "nm-l0":
            return ((groups != 0).sum(dim=1) > parsed.n).sum().to(weight.dtype) * parsed.m
        chosen = torch.combinations(torch.arange(parsed.m), parsed.n + 1)
        return groups[:, chosen].prod(dim=2).sum()

    return apply, value


OPERATORS = [
    "l1",
    "l0",
    *(f"group {name}" for name in BLOCKS),
    *(f"group-l0 {name}" for name in BLOCKS),
    *(f"nm-l0 {name}" for name in ("2:4", "1:4", "3:4")),
    *(f"nm {name}" for name in ("2:4", "1:4", "1:2", "3:4", "2:5")),
]


@pytest.mark.few(5)
@pytest.mark.parametrize("notation", OPERATORS)
def test_no_random_neighbour_is_better(notation: str) -> None:
    torch.manual_seed(0)
    apply, value = regularisers(notation)
    columns = 10 if notation == "nm 2:5" else 8
    for tau in (0.05, 0.4, 2.0):
        weight = torch.randn(8, columns, dtype=torch.float64)
        found = apply(weight, tau)

        def objective(point: Tensor, weight: Tensor = weight, tau: float = tau) -> float:
            return float((point - weight).square().sum() / 2 + tau * value(point))

        lowest = objective(found)
        for size in (1e-3, 0.1, 1.0):
            for _ in range(60):
                other = found + size * torch.randn_like(found)
                other = torch.where(torch.rand_like(found) < 0.5, other, found)
                other = torch.where(torch.rand_like(found) < 0.1, 0.0, other)
                assert objective(other) >= lowest - 1e-6


@pytest.mark.parametrize("notation", ["l1", *(f"group {name}" for name in BLOCKS)])
def test_convex_operators_are_firmly_nonexpansive(notation: str) -> None:
    apply, _ = regularisers(notation)
    torch.manual_seed(1)
    for _ in range(20):
        a, b = torch.randn(2, 8, 8, dtype=torch.float64)
        moved = apply(a, 0.5) - apply(b, 0.5)
        assert moved.square().sum() <= (moved * (a - b)).sum() + 1e-12


def test_soft_threshold_meets_the_subgradient_condition() -> None:
    weight = torch.linspace(-2, 2, 401, dtype=torch.float64)
    found = weight.clone()
    prox.soft_threshold_([found], 0.7)
    slope = (weight - found) / 0.7  # a subgradient of |.| at the result
    nonzero = found != 0
    assert torch.allclose(slope[nonzero], found[nonzero].sign())
    assert (slope[~nonzero].abs() <= 1).all()
    assert (~nonzero).sum() == (weight.abs() <= 0.7).sum()


def test_group_lasso_meets_the_subgradient_condition() -> None:
    torch.manual_seed(2)
    pattern = Pattern.parse("block:4x1")
    assert isinstance(pattern, GroupPattern)
    weight = torch.randn(16, 6, dtype=torch.float64)
    found = weight.clone()
    prox.group_soft_threshold_([found], 0.8, pattern)
    sizes = group_sizes(pattern, found)
    removed = group_sizes(pattern, weight - found)
    assert (sizes == 0).any()
    assert (sizes > 0).any()
    assert torch.allclose(removed[sizes > 0], torch.full_like(removed[sizes > 0], 0.8 * 2))
    assert (removed[sizes == 0] <= 0.8 * 2 + 1e-12).all()


@pytest.mark.few(1)
@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_nm_prox_equals_a_search_over_a_grid(tau: float) -> None:
    torch.manual_seed(3)
    steps = torch.linspace(0, 1.5, 31, dtype=torch.float64)
    grid = torch.cartesian_prod(steps, steps, steps, steps)
    triples = torch.combinations(torch.arange(4), 3)
    for weight in torch.rand(6, 4, dtype=torch.float64) * 1.5:
        found = weight[None].clone()
        prox.nm_shrink_([found], tau, NM(2, 4))

        def objective(points: Tensor, weight: Tensor = weight) -> Tensor:
            products = points[:, triples].prod(dim=2).sum(dim=1)
            return (points - weight).square().sum(dim=1) / 2 + tau * products

        best = grid[objective(grid).argmin()]
        assert float(objective(found)) <= float(objective(best[None])) + 1e-6
        assert float(objective(found)) >= float(objective(best[None])) - 0.02  # grid width


def nm(weight: Tensor, tau: float, pattern: str = "2:4") -> Tensor:
    out = weight.clone()
    prox.nm_shrink_([out], tau, Pattern.parse(pattern))
    return out


def test_nm_prox_is_equivariant_and_homogeneous() -> None:
    torch.manual_seed(4)
    weight = torch.randn(64, 4)
    found = nm(weight, 0.6)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(nm(weight[:, order], 0.6), found[:, order], atol=1e-6)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert torch.allclose(nm(weight * signs, 0.6), found * signs, atol=1e-6)
    for factor in (0.01, 30.0):
        assert torch.allclose(
            nm(weight * factor, 0.6 / factor), found * factor, rtol=1e-4, atol=1e-6
        )


def test_nm_prox_leaves_what_follows_the_pattern_and_reaches_it_when_strong() -> None:
    torch.manual_seed(5)
    weight = torch.randn(32, 8)
    pattern = NM(2, 4)
    follows = torch.where(pattern.keep(weight.abs(), 0.5), weight, 0.0)
    assert torch.equal(nm(follows, 3.0), follows)
    assert torch.equal(nm(weight, 1e6), follows)
    assert torch.equal(nm(weight, 0.0), weight)


def test_nm_prox_works_on_a_transposed_weight() -> None:
    torch.manual_seed(6)
    stored = torch.randn(8, 5)
    expected = nm(stored.T.contiguous(), 0.5)
    prox.nm_shrink_([stored.T], 0.5, NM(2, 4))
    assert torch.equal(stored.T, expected)


def test_nm_prox_refuses_long_groups() -> None:
    with pytest.raises(ValueError, match="at most 8"):
        prox.nm_shrink_([torch.ones(2, 16)], 0.1, NM(4, 16))


@cross("dtype, notation", [torch.float32, torch.bfloat16, torch.float16], OPERATORS)
def test_zero_stays_zero_and_nan_stays_nan(notation: str, dtype: torch.dtype) -> None:
    apply, _ = regularisers(notation)
    columns = 10 if notation == "nm 2:5" else 8
    zeros = torch.zeros(8, columns, dtype=dtype)
    assert torch.equal(apply(zeros, 0.3), zeros)
    damaged = torch.ones(8, columns, dtype=dtype)
    damaged[0, 0] = float("nan")
    assert apply(damaged, 0.3).isnan().any()


@cross("notation, dtype", OPERATORS, [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_fp32(notation: str, dtype: torch.dtype) -> None:
    apply, _ = regularisers(notation)
    torch.manual_seed(7)
    weight = torch.randn(8, 10 if notation == "nm 2:5" else 8).to(dtype)
    assert torch.equal(apply(weight, 0.3), apply(weight.float(), 0.3).to(dtype))


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 3), st.integers(0, 1000), st.booleans())
def test_multi_tensor_equals_one_by_one(tau: float, seed: int, own: bool) -> None:
    torch.manual_seed(seed)
    weights = [torch.randn(3, 4), torch.randn(7), torch.randn(2, 2)]
    taus = [torch.rand_like(weight) * tau for weight in weights] if own else tau
    one, multi = ([weight.clone() for weight in weights] for _ in range(2))
    prox.soft_threshold_(one, taus)
    prox.soft_threshold_(multi, taus, foreach=True)
    for a, b, weight in zip(one, multi, weights, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a == 0, weight.abs() <= (taus if not own else a.new_zeros(()))) or own


@pytest.mark.parametrize("notation", BLOCKS)
def test_group_threshold_in_a_metric_keeps_what_costs_more(notation: str) -> None:
    torch.manual_seed(8)
    pattern = Pattern.parse(notation)
    assert isinstance(pattern, GroupPattern)
    weight, metric = torch.randn(8, 8), torch.rand(8, 8) + 0.1
    height, width = pattern.group_shape(8, 8)
    losses = pattern.blocks(metric * weight.square()).sum(dim=(1, 3)) / 2
    tau = 1.01 * float(losses.median()) / (height * width)
    found = weight.clone()
    prox.group_hard_threshold_([found], tau, pattern, [metric])
    kept = pattern.spread(losses > tau * height * width, weight.shape)
    assert torch.equal(found, torch.where(kept, weight, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_shrunk_together_come_out_as_alone(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(prox, "_GPU_CHUNK", 40)
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 8), (6, 16), (30, 8), (1, 4)]
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    given[1] = given[1].T.contiguous().T  # as the weight of a Conv1D
    given[2][:, ::3] = 0
    taus = [0.05, 0.5, 0.1, 2.0]
    alone, together = ([weight.clone() for weight in given] for _ in range(2))
    prox.nm_shrink_(alone, taus, NM(2, 4))
    prox._shrink_joined_(together, taus, NM(2, 4))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
