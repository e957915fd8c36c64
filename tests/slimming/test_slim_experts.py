"""slim_ of mixtures: fewer blocks and fewer experts for one budget."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import drop_experts_, plan_slim, slim_
from hf_sparse.cli import commands, main
from hf_sparse.cli import slimming as slim_command
from hf_sparse.structure.mixtures import Mixtures
from tests.support.dense_folders import calibration, dense_folder
from tests.support.mixtures import grouped_mixture, mixture_batches, tiny_mixture
from tests.support.tiny_models import tiny_batches, tiny_model

FAMILIES = ("qwen3_moe", "mixtral")


def deep(family: str, **changes: Any) -> Any:
    return tiny_mixture(family, num_hidden_layers=4, **changes)


def data() -> list[dict[str, Any]]:
    return [{"input_ids": ids} for ids in mixture_batches(2, 16)]


@torch.no_grad()
def loss_of(model: Any, batches: list[Any]) -> float:
    losses = [model(**batch, labels=batch["input_ids"]).loss for batch in batches]
    return float(torch.stack(losses).mean())


@pytest.mark.few(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_has_the_weights_and_the_loss_of_the_plan(family: str, tmp_path: Path) -> None:
    model, batches = deep(family), data()
    whole, before = model.num_parameters(), copy.deepcopy(model.state_dict())
    config = model.config.to_dict()
    plan = plan_slim(model, batches, params=0.8)
    assert plan.axes == ("depth", "experts")
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert plan.loss == pytest.approx(loss_of(model, batches), abs=1e-5)
    assert {choice.experts for choice in plan.choices} > {4}
    assert {len(choice.removed) for choice in plan.choices} > {0}
    for choice in plan.choices:  # each mix is applied by itself, without the search
        assert choice.cost <= plan.limit
        other = copy.deepcopy(model)
        report = slim_(other, plan=hf_sparse.SlimPlan(**{**vars(plan), "choices": (choice,)}))
        assert report.parameters == (whole, int(choice.cost))
        assert {mixture.stack.number for mixture in Mixtures.of(other).mixtures} == {choice.experts}
        assert loss_of(other, batches) == pytest.approx(choice.loss, abs=1e-5)
    told = plan.table()
    assert "experts" in told
    assert "neurons" not in told
    slim_(model, plan=plan)
    hf_sparse.save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.model_type == family
    assert loss_of(loaded, batches) == pytest.approx(plan.best.loss, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_alone_are_what_drop_experts_takes(family: str) -> None:
    model, batches = deep(family), data()
    plan = plan_slim(model, batches, mb=0.88 * model.num_parameters() * 4 / 1e6, axes=("experts",))
    [choice] = plan.choices
    assert (choice.removed, choice.experts) == ((), 3)
    dropped = copy.deepcopy(model)
    drop_experts_(dropped, 1, batches)
    slim_(model, plan=plan)
    for name, tensor in dropped.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert model.config.to_dict() == dropped.config.to_dict()


def test_milliseconds_are_of_mixtures_with_fewer_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that a formula gives, as a real machine's would be different each time."""

    def timed(models: Any, inputs: Any) -> dict[str, float]:
        return {
            name: 3 + config.num_hidden_layers * (1 + 0.5 * config.num_local_experts)
            for name, (_, config) in models.items()
        }

    monkeypatch.setattr("hf_sparse.slimming.costs._timed", timed)
    plan = plan_slim(deep("mixtral"), data(), ms="0.8x")
    assert plan.cost == pytest.approx(3 + 4 * 3)
    for choice in plan.choices:
        left = 4 - len(choice.removed)
        assert choice.cost == pytest.approx(3 + left * (1 + 0.5 * choice.experts))
    assert {choice.experts for choice in plan.choices} > {4}


def test_milliseconds_are_measured() -> None:
    with pytest.raises(ValueError, match=r"is met already: .* ms"):
        plan_slim(deep("mixtral"), data(), ms=1e6)


def test_blocks_that_are_no_mixtures_keep_what_they_have() -> None:
    model, batches = grouped_mixture(num_hidden_layers=3), data()
    plan = plan_slim(model, batches, params=0.9, axes=("experts",))
    assert plan.experts == 8
    assert plan.best.experts is not None
    assert plan.best.experts % 2 == 0
    report = slim_(model, plan=plan)
    assert report.parameters[1] == int(plan.best.cost) == model.num_parameters()


def test_refused_before_work() -> None:
    batches = data()
    with pytest.raises(ValueError, match=r"'experts' is not open: no experts.*Take axes=\('depth"):
        plan_slim(tiny_model("llama"), tiny_batches("llama"), params=0.8, axes=("experts",))
    model = deep("mixtral")
    with pytest.raises(
        ValueError, match=r"cannot be kept.*axes experts reach.*nearest is params=0"
    ):
        plan_slim(model, batches, params=0.3, axes=("experts",))
    plan = plan_slim(model, batches, params=0.8)
    drop_experts_(model, 1, batches)
    with pytest.raises(
        ValueError, match="of 4 experts; this MixtralForCausalLM has 4 blocks of 3 experts"
    ):
        slim_(model, plan=plan)


@pytest.mark.slow
def test_the_command_refuses_a_budget_before_it_reads_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = dense_folder(tmp_path, deep("mixtral"), 20_000)
    start, end = ["slim", str(dense), str(tmp_path / "out")], calibration(tmp_path, 32)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("weights were read")

    with monkeypatch.context() as watched:
        watched.setattr(slim_command, "load", never)
        watched.setattr(slim_command, "batches_of", never)
        for budget, message in (
            (["--params", "0.05"], "The nearest is --params 0."),
            (["--mb", "0.01"], "The nearest is --mb 0."),
            (["--mb", "100"], "is met already"),
            (["--mb", "0.3", "--dtype", "bfloat16"], "is met already"),
            (["--ms", "2x"], "ms is '2x'"),
            (["--params", "0.5", "--axes", "width"], "Known families"),
        ):
            assert main([*start, *budget, *end]) == 1
            assert message in " ".join(capsys.readouterr().err.split()), budget
    assert main([*start, "--params", "0.8", *end]) == 0
    assert "by depth and experts" in capsys.readouterr().out
    assert "slim" in commands.COMMANDS
