"""Reaching a wanted sparsity while training: schedules, methods, exactness, resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hf_sparse
from hf_sparse import (
    Schedule,
    SparseAdamW,
    Sparsifier,
    SparsityConfig,
    add_shrinkage,
    sparse_param_groups,
)
from hf_sparse.optim.methods import TRAINING_METHODS
from hf_sparse.optim.schedules import SHAPES
from tests.tiny_models import tiny_batches, tiny_model

PATTERNS = ["unstructured", "block:4x1", "row", "2:4"]


def config_of(pattern: str, sparsity: float = 0.6) -> SparsityConfig:
    return SparsityConfig(pattern, None if pattern == "2:4" else sparsity)


def run(
    model: nn.Module,
    config: SparsityConfig,
    total: int = 40,
    *,
    stop: int | None = None,
    state: dict | None = None,
    first: int = 0,
    settings: dict | None = None,
    **arguments: Any,
) -> tuple[SparseAdamW, Sparsifier]:
    """Train a tiny causal LM on fixed batches."""
    optimizer = SparseAdamW(sparse_param_groups(model, config), lr=3e-3, **(settings or {}))
    if state:
        optimizer.load_state_dict(state)
    sparsifier = Sparsifier(optimizer, config, total, interval=4, **arguments)
    batches = tiny_batches("gpt2", 8)
    model.train()
    for step in range(first, stop or total):
        batch = batches[step % len(batches)]
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
    return optimizer, sparsifier


@pytest.mark.parametrize("method", TRAINING_METHODS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_target_is_reached_exactly_and_kept(method: str, pattern: str, family: str) -> None:
    model = tiny_model(family)
    config = config_of(pattern)
    _, sparsifier = run(model, config, method=method, schedule=Schedule(end=0.6))
    report = hf_sparse.measure_sparsity(model, config)
    assert sparsifier.finished
    assert report.violations == 0
    sparsifier.check()
    if pattern in ("unstructured", "2:4"):
        assert report.zeros == round(config.sparsity * report.numel)
    elif pattern == "block:4x1":
        assert report.zeros == 4 * round(config.sparsity * report.numel / 4)
    assert sparsifier.sparsity == report.sparsity


@pytest.mark.parametrize(
    ("penalty", "pattern", "scale"),
    [
        ("l1", "unstructured", "lr"),
        ("l1", "unstructured", "adaptive"),
        ("l1", "unstructured", "constant"),
        ("reweighted_l1", "unstructured", "adaptive"),
        ("l0", "unstructured", "adaptive"),
        ("l0", "block:4x1", "adaptive"),
        ("group_l2", "block:4x1", "lr"),
        ("group_l2", "row", "lr"),
    ],
)
def test_the_controller_alone_follows_the_schedule(penalty: str, pattern: str, scale: str) -> None:
    model = tiny_model("gpt2")
    config = config_of(pattern, 0.7)
    settings = {"penalty": penalty, "scale": scale}
    schedule = Schedule("linear", 0.0, 1.0)
    _, sparsifier = run(model, config, 160, stop=150, settings=settings, schedule=schedule)
    assert not sparsifier.finished
    assert sparsifier.lam > 0
    assert abs(sparsifier.sparsity - 0.7 * 150 / 160) < 0.06


@pytest.mark.parametrize("method", TRAINING_METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("stop", [14, 30])
def test_resume_is_bit_exact(method: str, pattern: str, stop: int) -> None:
    config = config_of(pattern)
    whole = tiny_model("gpt2")
    whole.config.resid_pdrop = 0.0
    for module in whole.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    arguments = {"method": method, "schedule": Schedule(end=0.6)}
    run(whole, config, **arguments)
    expected = {name: value.clone() for name, value in whole.state_dict().items()}

    whole.load_state_dict(start)
    optimizer, _ = run(whole, config, stop=stop, **arguments)
    state = optimizer.state_dict()
    _, resumed = run(whole, config, state=state, first=stop, **arguments)
    assert resumed.finished
    assert resumed.steps == 40
    for name, value in whole.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("method", TRAINING_METHODS)
def test_any_optimizer_reaches_the_target(method: str) -> None:
    model = tiny_model("gpt2")
    config = config_of("unstructured")
    groups = sparse_param_groups(model, config)
    optimizer = add_shrinkage(torch.optim.SGD(groups, lr=1e-2, momentum=0.9))
    sparsifier = Sparsifier(optimizer, config, 20, method=method, interval=3)
    for batch in tiny_batches("gpt2", 20):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
    sparsifier.check()
    assert hf_sparse.measure_sparsity(model).zeros == round(
        0.6 * hf_sparse.measure_sparsity(model).numel
    )


def test_sparse_training_learns_and_beats_pruning_at_the_end() -> None:
    batches = tiny_batches("gpt2", 8)

    def loss(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return sum(float(model(**b, labels=b["input_ids"]).loss) for b in batches) / len(
                batches
            )

    config = config_of("unstructured", 0.8)
    sparse, dense = tiny_model("gpt2"), tiny_model("gpt2")
    before = loss(sparse)
    run(sparse, config, 120)
    run(dense, config, 120, stop=119, schedule=Schedule("constant", 1.0, 1.0))
    hf_sparse.prune_(dense, config, "magnitude")
    assert loss(sparse) < before - 0.5
    assert loss(sparse) < loss(dense)


def test_zeros_that_are_there_count() -> None:
    model = tiny_model("gpt2")
    config = config_of("unstructured", 0.8)
    hf_sparse.prune_(model, config_of("unstructured", 0.5), "magnitude")
    optimizer, _ = run(model, config, 40, stop=5, method="magnitude")
    assert optimizer.param_groups[0]["sparsifier"]["initial"] == pytest.approx(0.5, abs=1e-3)
    assert 0.5 < hf_sparse.measure_sparsity(model).sparsity < 0.8


@pytest.mark.parametrize("shape", SHAPES)
def test_schedules_rise_from_begin_to_end(shape: str) -> None:
    schedule = Schedule(shape, 0.2, 0.8)
    values = [schedule.progress(step, 100) for step in range(101)]
    assert values[:20] == [0.0] * 20
    assert values[80:] == [1.0] * 21
    assert values == sorted(values)
    assert schedule.last_step(100) == 80
    if shape == "cubic":
        assert values[50] == pytest.approx(1 - 0.5**3)
    if shape == "linear":
        assert values[50] == pytest.approx(0.5)


def test_bad_input_is_refused() -> None:
    model = tiny_model("gpt2")
    config = config_of("unstructured")
    optimizer = SparseAdamW(sparse_param_groups(model, config))
    with pytest.raises(ValueError, match=r"runs from 0.8 to 0.5"):
        Schedule("cubic", 0.8, 0.5)
    with pytest.raises(ValueError, match="unknown schedule 'cosine'"):
        Sparsifier(optimizer, config, 10, schedule="cosine")
    with pytest.raises(ValueError, match="unknown method 'lottery'"):
        Sparsifier(optimizer, config, 10, method="lottery")
    with pytest.raises(ValueError, match="total_steps=0"):
        Sparsifier(optimizer, config, 0)
    with pytest.raises(ValueError, match="have pattern 'unstructured', the config has '2:4'"):
        Sparsifier(optimizer, config_of("2:4"), 10)
    with pytest.raises(ValueError, match="sparse_param_groups"):
        Sparsifier(torch.optim.AdamW(model.parameters()), config, 10)
    with pytest.raises(ValueError, match=r"threshold is 0\.7"):
        Sparsifier(optimizer, config, 10, method="movement", threshold=0.7)


def test_weights_that_are_not_finite_stop_the_run() -> None:
    model = tiny_model("gpt2")
    config = config_of("unstructured")
    optimizer = SparseAdamW(sparse_param_groups(model, config), lr=1e-3)
    sparsifier = Sparsifier(optimizer, config, 10, interval=1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    with pytest.raises(ValueError, match="NaN or infinite"):
        sparsifier.step()


def test_the_check_notices_lost_zeros() -> None:
    model = tiny_model("gpt2")
    _, sparsifier = run(model, config_of("block:4x1"), 10)
    sparsifier.check()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)
    with pytest.raises(ValueError, match=r"promised was a share of 0\.6"):
        sparsifier.check()
