"""Sparsity from a latency budget."""

from __future__ import annotations

import itertools

import pytest
import torch

import hf_sparse
from hf_sparse import budget
from hf_sparse.budget import Choice
from hf_sparse.patterns import Pattern
from hf_sparse.runtime.weights.rates import NOMINAL
from tests.support.tiny_models import tiny_batches, tiny_model


@pytest.fixture(autouse=True)
def nominal_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices that do not depend on what else the machine does."""
    monkeypatch.setattr(budget, "calibrate", lambda target, cache: NOMINAL["avx512"])


@pytest.mark.few(2)
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_budget_is_kept_and_used(fraction: float, calibrated: bool) -> None:
    model = tiny_model("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = tiny_batches("bert") if calibrated else None
    allocation = hf_sparse.allocate(model, f"{fraction}x", batches)
    assert allocation.fraction <= fraction
    assert allocation.fraction > fraction - 0.15
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for config in allocation.configs:
        hf_sparse.prune_(model, config, "magnitude")
    by_name = {tensor.name: tensor for tensor in hf_sparse.measure_sparsity(model).tensors}
    for choice in allocation.choices:
        tensor = by_name[f"{choice.name}.weight"]
        assert tensor.sparsity == pytest.approx(choice.sparsity, abs=0.02)
        assert choice.name in str(allocation)


def test_the_choice_is_the_best_for_its_time() -> None:
    """Against all combinations: none with at most the same time has less error."""
    random = torch.Generator().manual_seed(0)
    options = []
    for layer in range(4):
        times, errors = torch.rand(2, 5, generator=random).tolist()
        options.append(
            [
                Choice(str(layer), Pattern.parse("unstructured"), 0.5, time, error)
                for time, error in zip(times, errors, strict=True)
            ]
        )
    least = sum(min(choice.time for choice in layer) for layer in options)
    for limit in (1.05 * least, 1.3 * least, 2 * least):
        chosen = budget._cheapest(options, limit)
        time, error = (sum(getattr(c, name) for c in chosen) for name in ("time", "error"))
        assert time <= limit
        better = [
            combination
            for combination in itertools.product(*options)
            if sum(c.time for c in combination) <= time
            and sum(c.error for c in combination) < error - 1e-12
        ]
        assert not better


def test_layers_that_matter_more_keep_more() -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("intermediate.dense.weight"):  # a few weights have all the energy
                parameter.mul_(torch.rand_like(parameter) ** 20)
    allocation = hf_sparse.allocate(model, 0.4, patterns=["unstructured"])
    sparsity = {choice.name: choice.sparsity for choice in allocation.choices}
    concentrated = [value for name, value in sparsity.items() if "intermediate" in name]
    others = [value for name, value in sparsity.items() if "intermediate" not in name]
    assert min(concentrated) > max(others)


def test_patterns_that_do_not_divide_a_layer_are_left_out() -> None:
    allocation = hf_sparse.allocate(tiny_model("llama"), "0.8x", patterns=["2:4", "block:5x1"])
    assert {str(choice.pattern) for choice in allocation.choices} <= {"2:4", "None"}


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x1", "block:16x1"])
def test_sparsity_for_a_budget(pattern: str) -> None:
    found = [hf_sparse.sparsity_for(f"{fraction}x", pattern) for fraction in (1.0, 0.5, 0.25, 0.1)]
    assert found == sorted(found)
    assert found[0] == 0
    assert 0.5 <= found[1] < 0.8


@pytest.mark.parametrize("wrong", ["fast", "0x", "2x", "-1", "", 0, 1.5, None, float("nan")])
def test_budgets_that_are_none(wrong: object) -> None:
    with pytest.raises(ValueError, match="wanted a fraction"):
        hf_sparse.allocate(tiny_model("bert"), wrong)


def test_budgets_that_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match="cannot be kept"):
        hf_sparse.allocate(tiny_model("bert"), "0.001x")
    with pytest.raises(ValueError, match="no sparsity"):
        hf_sparse.sparsity_for("0.001x", "unstructured")
    with pytest.raises(ValueError, match="fixes its sparsity"):
        hf_sparse.sparsity_for("0.5x", "2:4")
