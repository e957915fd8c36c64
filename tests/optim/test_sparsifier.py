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
    add_shrinkage_,
    sparse_param_groups,
)
from hf_sparse.optim.methods import TRAINING_METHODS
from hf_sparse.optim.schedules import SHAPES
from tests.support.closeness import nearly_same
from tests.support.crosses import cross
from tests.support.tiny_models import tiny_batches, tiny_model

PATTERNS = ["unstructured", "block:4x1", "row", "2:4"]


def config_of(pattern: str, sparsity: float = 0.6) -> SparsityConfig:
    targets = ["*[0-9].*"] if pattern == "row" else None  # all rows, not those of neurons alone
    return SparsityConfig(pattern, None if pattern == "2:4" else sparsity, targets)


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


def sparsities(model: nn.Module, optimizer: Any, sparsifier: Sparsifier, steps: int) -> list[float]:
    """After each step of training a tiny GPT-2."""
    reached = []
    for batch in tiny_batches("gpt2", steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
        reached.append(sparsifier.sparsity)
    return reached


@pytest.mark.few(1)
@cross("method, pattern, family", TRAINING_METHODS, PATTERNS, ["gpt2", "llama"])
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("penalty", "pattern", "scale"),
    [
        ("l1", "unstructured", "constant"),
        ("reweighted_l1", "unstructured", "adaptive"),
        ("l0", "block:4x1", "adaptive"),
        ("group_l2", "row", "lr"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("l1", "unstructured", "lr"),
                ("l1", "unstructured", "adaptive"),
                ("l0", "unstructured", "adaptive"),
                ("group_l2", "block:4x1", "lr"),
            )
        ),
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


@pytest.mark.few(1)
@cross("method, pattern, stop", TRAINING_METHODS, ["unstructured", "2:4"], [14, 30])
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
        assert nearly_same(value, expected[name]), name


@pytest.mark.few(1)
@pytest.mark.parametrize("method", TRAINING_METHODS)
def test_any_optimizer_reaches_the_target(method: str) -> None:
    model = tiny_model("gpt2")
    config = config_of("unstructured")
    groups = sparse_param_groups(model, config)
    optimizer = add_shrinkage_(torch.optim.SGD(groups, lr=1e-2, momentum=0.9))
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


@pytest.mark.slow
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
    with pytest.raises(ValueError, match="total_steps is 0"):
        Sparsifier(optimizer, config, 0)
    with pytest.raises(ValueError, match="have pattern 'unstructured', the config has '2:4'"):
        Sparsifier(optimizer, config_of("2:4"), 10)
    with pytest.raises(ValueError, match="sparse_param_groups"):
        Sparsifier(torch.optim.AdamW(model.parameters()), config, 10)
    with pytest.raises(ValueError, match="AdamW has no shrinkage"):
        Sparsifier(torch.optim.AdamW(sparse_param_groups(model, config)), config, 10)
    with pytest.raises(ValueError, match="a norm or a bias"):
        Sparsifier(SparseAdamW(model.parameters()), config, 10)
    with pytest.raises(ValueError, match=r"interval is 2\.5"):
        Sparsifier(optimizer, config, 10, interval=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"begin='0\.1'"):
        Schedule("cubic", "0.1", 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="score_lr is nan"):
        Sparsifier(optimizer, config, 10, method="movement", score_lr=float("nan"))
    optimizer = SparseAdamW(sparse_param_groups(model, config))
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


@pytest.mark.few(1)
@pytest.mark.parametrize("method", TRAINING_METHODS)
def test_nothing_happens_before_the_beginning(method: str) -> None:
    model = tiny_model("gpt2")
    schedule = Schedule("constant", 0.55, 0.9)
    _, sparsifier = run(
        model, config_of("unstructured"), 40, stop=21, method=method, schedule=schedule
    )
    assert sparsifier.sparsity == 0
    assert sparsifier.lam == 0


@pytest.mark.few(1)
@pytest.mark.parametrize("method", TRAINING_METHODS)
def test_a_short_run_adjusts_more_often(method: str) -> None:
    model = tiny_model("gpt2")
    config = config_of("unstructured")
    optimizer = SparseAdamW(sparse_param_groups(model, config), lr=1e-3, penalty="l0")
    sparsifier = Sparsifier(optimizer, config, 15, method=method, schedule=Schedule(end=0.6))
    assert sparsifier.interval == 1
    reached = sparsities(model, optimizer, sparsifier, 15)
    assert reached[-1] == pytest.approx(0.6, abs=1e-4)
    if method not in ("movement", "admm"):  # these become sparse at the end
        assert 0 < reached[3] < reached[5] < 0.6


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("sparsity", "method"), [(0.8, "proximal"), (0.3, "proximal"), (0.6, "magnitude")]
)
@pytest.mark.parametrize("stop", [14, 39])
def test_another_target_on_the_way_is_refused(sparsity: float, method: str, stop: int) -> None:
    model = tiny_model("gpt2")
    optimizer, _ = run(model, config_of("unstructured"), stop=stop)
    with pytest.raises(ValueError, match=r"on its way to a share of 0\.6 by method 'proximal'"):
        Sparsifier(optimizer, config_of("unstructured", sparsity), 40, method=method)


def test_a_snapshot_of_the_state_does_not_move_on() -> None:
    model = tiny_model("gpt2")
    optimizer, sparsifier = run(model, config_of("unstructured"), stop=5)
    saved = optimizer.state_dict()
    sparsifier.step()
    assert saved["param_groups"][0]["sparsifier"]["steps"] == 5


def test_a_target_without_gradient_is_named_in_time() -> None:
    model = tiny_model("gpt2")
    config = config_of("unstructured")
    optimizer = SparseAdamW(
        sparse_param_groups(model, config), lr=1e-3, penalty="l0", scale="adaptive"
    )
    sparsifier = Sparsifier(optimizer, config, 40, schedule=Schedule(begin=0.0))
    for batch in tiny_batches("gpt2", 1):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    model.transformer.h[2].mlp.c_fc.weight.grad = None
    optimizer.step()
    sparsifier.step()
    with pytest.raises(ValueError, match=r"h\.2\.mlp\.c_fc\.weight has had no gradient"):
        sparsifier.step()


def test_a_group_at_rest_does_not_stop_the_others() -> None:
    model = tiny_model("gpt2")
    config = config_of("unstructured")
    groups = sparse_param_groups(model, config)
    still = {**groups[0], "params": groups[0]["params"][:2], "lr": 0.0}
    groups[0]["params"] = groups[0]["params"][2:]
    optimizer = SparseAdamW([*groups, still], lr=1e-3, penalty="l0", scale="adaptive")
    sparsifier = Sparsifier(optimizer, config, 40)
    for batch in tiny_batches("gpt2", 20):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
    assert sparsifier.lam > 0
    assert sparsifier.sparsity > 0.4


def test_a_first_step_that_the_scaler_skipped_is_waited_for() -> None:
    model = tiny_model("gpt2")
    config = config_of("unstructured")
    groups = sparse_param_groups(model, config)
    optimizer = SparseAdamW(groups, lr=1e-3, penalty="l0", scale="adaptive", fused=True)
    sparsifier = Sparsifier(optimizer, config, 40, interval=1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)  # as GradScaler does
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    sparsifier.step()
    assert sparsifier.lam == 0


@pytest.mark.few(1)
@pytest.mark.parametrize("scale", ["lr", "adaptive"])
def test_l0_holds_its_zeros_when_no_more_are_due(scale: str) -> None:
    model = tiny_model("gpt2")
    config = config_of("unstructured")
    groups = sparse_param_groups(model, config)
    optimizer = SparseAdamW(groups, lr=1e-3, penalty="l0", scale=scale)
    schedule = Schedule("constant", 0.0, 1.0)
    sparsifier = Sparsifier(optimizer, config, 60, schedule=schedule, interval=2)
    reached = sparsities(model, optimizer, sparsifier, 50)
    assert min(reached[10:]) > 0.55
