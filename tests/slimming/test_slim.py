"""slim_: one budget, the mixes that keep to it, and the plain model that is left."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import plan_slim, slim_
from hf_sparse.cli import main
from hf_sparse.provenance.record import provenance_of
from hf_sparse.slimming.search import AXES
from hf_sparse.structure.units import find_units
from tests.support.any_models import build, tiny_config
from tests.support.deep_models import adapted, deep_model, loss_of
from tests.support.dense_folders import dense_folder
from tests.support.tiny_models import (
    tiny_batches,
    tiny_classifier,
    tiny_model,
)
from tests.support.unchanged import unchanged


def deep(family: str = "llama") -> Any:
    return deep_model(family, least=2)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "family", ["llama", pytest.param("gemma", marks=pytest.mark.slow), "gpt_neox"]
)
def test_what_is_left_has_the_weights_and_the_loss_of_the_plan(family: str, tmp_path: Path) -> None:
    model, batches = deep(family), tiny_batches("llama")
    whole = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    before = copy.deepcopy(model.state_dict())
    plan = plan_slim(model, batches, params=0.75)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert plan.loss == pytest.approx(loss_of(model, batches), abs=1e-5)
    assert plan.cost == whole
    assert all(choice.cost <= plan.limit == 0.75 * whole for choice in plan.choices)
    assert plan.best.loss == min(choice.loss for choice in plan.choices)
    depths = {len(choice.removed) for choice in plan.choices}
    assert 1 in depths
    for choice in plan.choices:  # each mix is applied by itself, without the search
        other = copy.deepcopy(model)
        from_plan = hf_sparse.SlimPlan(**{**vars(plan), "choices": (choice,)})
        report = slim_(other, plan=from_plan)
        assert report.parameters == (whole, int(choice.cost))
        assert loss_of(other, batches) == pytest.approx(choice.loss, abs=1e-4)
    report = slim_(model, plan=plan)
    assert report.parameters[1] == int(plan.best.cost)
    assert provenance_of(model).steps[-1].method == "slim"
    hf_sparse.save_pretrained(model, tmp_path)
    loaded, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    assert loaded.config.model_type == family
    assert loss_of(loaded, batches) == pytest.approx(plan.best.loss, abs=1e-4)
    card = (tmp_path / "README.md").read_text()
    assert "slim" in card
    assert "params=0.75" in card


def test_an_axis_alone_is_what_the_other_calls_do() -> None:
    model, batches = deep(), tiny_batches("llama")
    plan = plan_slim(model, batches, params=0.8, axes=("depth",))
    dropped = copy.deepcopy(model)
    half = batches[:2]  # of three: what blocks are ordered on
    report = hf_sparse.drop_blocks_(dropped, len(plan.best.removed), half)
    assert report.removed == plan.best.removed
    assert all(choice.size is None for choice in plan.choices)
    slim_(model, plan=plan)
    for one, other in zip(model.parameters(), dropped.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    model = deep()
    plan = plan_slim(model, batches, params=0.8, axes=("width",))
    assert all(choice.removed == () for choice in plan.choices)
    slim_(model, plan=plan)
    assert {units.size for units in find_units(model)} == {plan.best.size}
    assert len(model.model.layers) == 4


def test_megabytes_and_numbers_of_weights_are_the_same_budget() -> None:
    model, batches = deep(), tiny_batches("llama")
    total = model.num_parameters()
    plans = [
        plan_slim(model, batches, **budget)
        for budget in ({"params": 0.8}, {"params": int(0.8 * total)}, {"mb": 0.8 * total * 4 / 1e6})
    ]
    assert len({plan.best.removed for plan in plans}) == 1
    assert len({plan.best.size for plan in plans}) == 1
    assert plans[2].best.cost == pytest.approx(plans[0].best.cost * 4 / 1e6)
    assert "MB" in str(plans[2])


def test_milliseconds_are_of_smaller_models_of_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that a formula gives, as a real machine's would be different each time."""
    seen = []

    def timed(models: Any, inputs: Any) -> dict[str, float]:
        seen.append(inputs["input_ids"].shape)
        found = {}
        for name, (_, config) in models.items():
            one = 1 + 0.5 * config.num_key_value_heads + config.intermediate_size / 64
            found[name] = 3 + config.num_hidden_layers * one
        return found

    monkeypatch.setattr("hf_sparse.slimming.costs._timed", timed)
    model, batches = deep(), tiny_batches("llama")
    plan = plan_slim(model, batches, ms="0.7x")
    assert plan.cost == pytest.approx(3 + 4 * 3)
    assert seen == [(1, batches[0]["input_ids"].shape[1])]
    for choice in plan.choices:
        one = 1 + 0.5 * choice.size.key_heads + choice.size.neurons / 64
        assert choice.cost == pytest.approx(3 + (4 - len(choice.removed)) * one)
        assert choice.cost <= 0.7 * 15 + 1e-6
    again = plan_slim(model, batches, ms=10.5).best
    assert (again.removed, again.size) == (plan.best.removed, plan.best.size)
    assert again.loss == pytest.approx(plan.best.loss, rel=1e-4)


def test_milliseconds_are_measured() -> None:
    with pytest.raises(ValueError, match=r"is met already: .* ms"):
        plan_slim(deep(), tiny_batches("llama"), ms=1e6)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (deep, {}, "the budget is missing"),
    (deep, {"params": 0.7, "mb": 1}, "the budget is params, mb"),
    (deep, {"params": 1.0}, r"params is 1\.0; wanted a share"),
    (deep, {"params": True}, "params is True"),
    (deep, {"ms": "0.6"}, r"ms is '0\.6'; wanted"),
    (deep, {"ms": "1.2x"}, r"ms is '1\.2x'"),
    (deep, {"mb": -1}, "mb is -1"),
    (deep, {"params": 10**9}, "is met already"),
    (deep, {"params": 0.05}, r"cannot be kept: .*The nearest is params=0\.\d{3}\."),
    (deep, {"mb": 0.01}, r"The nearest is mb=\d\.\d\d\."),
    (deep, {"params": 0.7, "axes": ("deep",)}, "wanted a tuple of some of 'depth'"),
    (deep, {"params": 0.7, "axes": ()}, "wanted a tuple of some of 'depth'"),
    (deep, {"params": 0.7, "axes": "depth"}, "axes"),
    (deep, {"params": 0.7, "axes": ("depth", "depth")}, "named twice"),
    (
        lambda: tiny_model("albert"),
        {"params": 0.7},
        r"axis 'depth' is not open: .* run several times",
    ),
    (
        lambda: build(tiny_config("mixtral"), _causal("mixtral")),
        {"params": 0.9, "axes": ("width",)},
        "Known families",
    ),
    (tiny_classifier, {"params": 0.7}, "the batches have no labels"),
    (lambda: deep().to("meta"), {"params": 0.7}, "meta device"),
    (lambda: adapted(deep()), {"params": 0.7}, "has adapters"),
    (lambda: nn.Linear(2, 2), {"params": 0.7}, "takes a transformers model"),
]


def _causal(model_type: str) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(tiny_config(model_type))]


@pytest.mark.few(9)
@pytest.mark.parametrize(("make", "changes", "message"), REFUSED)
def test_it_is_refused_before_work(make: Any, changes: dict[str, Any], message: str) -> None:
    model = make()
    with unchanged(model), pytest.raises(ValueError, match=message):
        slim_(model, tiny_batches("llama"), **changes)


def test_a_budget_that_is_told_as_the_nearest_can_be_kept() -> None:
    model, batches = deep(), tiny_batches("llama")
    with pytest.raises(ValueError, match="cannot be kept") as told:
        plan_slim(model, batches, params=0.05)
    nearest = float(str(told.value).rpartition("params=")[2].rstrip("."))
    assert plan_slim(model, batches, params=nearest).choices


def test_plans_belong_to_their_model() -> None:
    batches = tiny_batches("llama")
    plan = plan_slim(deep(), batches, params=0.8)
    with pytest.raises(ValueError, match="Plan for this model"):
        slim_(tiny_model("llama"), plan=plan)
    with pytest.raises(ValueError, match="no batches and no budget"):
        slim_(deep(), batches, plan=plan)
    with pytest.raises(ValueError, match="neither batches nor a plan"):
        slim_(deep(), params=0.8)
    assert json.loads(plan.to_json())["best"]["loss"] == plan.best.loss
    assert "best" in plan.table()
    assert repr(plan).startswith("<SlimPlan for params=0.8")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, out = str(dense_folder(tmp_path, deep(), 20_000)), str(tmp_path / "out")
    text = str(tmp_path / "text.txt")
    command = ["slim", dense, out, "--params", "0.8", "--calibration", text]
    command += ["--window", "32", "--num-samples", "4"]
    assert main([*command, "--axes", "depth"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("params=0.8: at most") < printed.index(f"saved to {out}")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.num_hidden_layers < 4
    assert main(command) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "other"), "--params", "0.05", *command[5:]]) == 1
    assert "The nearest is --params 0." in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_axes_of_the_command_are_those_of_the_call() -> None:
    from hf_sparse_cli.choices import SLIM_AXES

    assert SLIM_AXES == AXES
