"""Blocks of one size: plain models of the family that load where hf_sparse is not installed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertForSequenceClassification, PreTrainedModel

import hf_sparse
from hf_sparse import SparsityConfig, prune_, shrink_
from hf_sparse.cli import main
from hf_sparse.provenance.record import provenance_of
from hf_sparse.structure.parts import BlockSize
from hf_sparse.structure.units import find_units
from tests.support.plain_models import check_plain
from tests.support.tiny_models import CONFIGS, tiny_batches, tiny_classifier, tiny_model

GROUPED = ("llama", "mistral", "qwen2", "qwen3")
OTHERS = tuple(family for family in CONFIGS if family not in GROUPED)
NEURONS = SparsityConfig("column", 0.25, uniform=True)
HEADS = SparsityConfig("head", 0.5, uniform=True)


def small_model(family: str) -> PreTrainedModel:
    """A model that lost a quarter of its neurons, and half of its heads where its config can tell."""
    model = tiny_classifier() if family == "bert" else tiny_model(family)
    prune_(model, NEURONS, "magnitude")
    if family in GROUPED:
        prune_(model, HEADS, "magnitude")
    return model


@torch.no_grad()
def first_output(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = model(input_ids=ids)[0]
    return output


@pytest.mark.slow
def test_every_family_loads_as_a_plain_model_without_the_package(tmp_path: Path) -> None:
    ids = tiny_batches("llama")[0]["input_ids"]
    wanted, models, generated = {}, {}, {}
    for family in CONFIGS:
        model = small_model(family)
        before = first_output(model, ids)
        report = shrink_(model)
        assert report.plain
        assert report.uniform
        assert getattr(model.config, "block_sizes", None) is None
        wanted[family] = first_output(model, ids)
        torch.testing.assert_close(wanted[family], before, atol=2e-5, rtol=1e-4)
        models[family] = model
        if family in GROUPED:
            [size] = {units.size for units in find_units(model)}
            assert size == BlockSize(2, 1, 48)
            settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
            generated[family] = model.generate(ids, **settings).tolist()
        hf_sparse.save_pretrained(model, tmp_path / family)
        save_file({"input_ids": ids, "output": wanted[family]}, tmp_path / f"{family}.safetensors")
    assert type(models["bert"]) is BertForSequenceClassification
    check_plain(tmp_path, models, generated)
    config = json.loads((tmp_path / "qwen2" / "config.json").read_text())
    sizes = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim")
    assert [config[name] for name in sizes] == [2, 1, 48, 8]
    assert not {"block_sizes", "quantization_config", "auto_map"} & config.keys()


def test_it_is_loaded_and_shrunk_again_by_the_package(tmp_path: Path) -> None:
    model = small_model("llama")
    shrink_(model)
    hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("unstructured", 0.0))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sparse_llama"
    loaded = hf_sparse.SparseLlamaForCausalLM.from_pretrained(tmp_path)
    prune_(loaded, NEURONS, "magnitude")
    assert {size.neurons for size in shrink_(loaded).after} == {36}
    assert loaded.config.intermediate_size == 36
    steps = provenance_of(loaded).steps
    assert all(dict(step.options)["uniform"] is True for step in steps)
    methods = ["magnitude", "magnitude", "shrink", "magnitude", "shrink"]
    assert [step.method for step in steps] == methods


@pytest.mark.parametrize("family", OTHERS)
def test_heads_that_the_familys_config_cannot_tell_are_refused_before_work(family: str) -> None:
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    config = SparsityConfig("head", 0.25, uniform=True)
    message = (
        rf"3 heads and \d+ neurons cannot be told by a config of type '{family}': .* nearest is 4"
    )
    with pytest.raises(ValueError, match=message):
        prune_(model, config, "taylor")  # batches, which it needs, are asked for later
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_is_refused_before_it_is_streamed(tmp_path: Path) -> None:
    hf_sparse.save_pretrained(tiny_model("opt"), tmp_path / "dense")
    with pytest.raises(ValueError, match="cannot be told by a config of type 'opt'"):
        hf_sparse.prune_checkpoint(
            tmp_path / "dense",
            tmp_path / "out",
            SparsityConfig("head", 0.25, uniform=True),
            "wanda",
            tiny_batches("opt"),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_the_error_names_the_nearest_number_of_heads_that_can_be_told() -> None:
    model = tiny_model("llama", num_key_value_heads=4)  # its heads have to divide the hidden size
    with pytest.raises(ValueError, match=r"it tells 1, 2, 4 heads, the nearest is 4"):
        prune_(model, SparsityConfig("head", 0.25, uniform=True), "magnitude")
    prune_(model, HEADS, "magnitude")
    assert {size.heads for size in shrink_(model).after} == {2}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "bert"])
def test_unequal_zeros_are_removed_evenly_when_asked(family: str) -> None:
    model = tiny_model(family)
    for number, units in enumerate(find_units(model)):
        units.down.weight[:, : 10 + number] = 0
        if family != "bert":
            units.out.weight[:, units.features(torch.tensor([0, 2, 3][: 1 + number]))] = 0
    ids = tiny_batches(family)[0]["input_ids"]
    before = first_output(model, ids)
    uneven = shrink_(copy.deepcopy(model))
    assert len(set(uneven.after)) > 1
    assert not uneven.plain
    report = shrink_(model, uniform=True)
    assert set(report.after) == {BlockSize(4, 4 if family == "bert" else 2, 54)}
    assert sum("neurons are zero and stay" in note for note in report.notes) == 2
    torch.testing.assert_close(first_output(model, ids), before, atol=2e-5, rtol=1e-4)
    assert "a plain model" in report.summary()


@torch.no_grad()
def test_blocks_that_were_made_unequal_before_are_refused() -> None:
    model = tiny_model("llama")
    find_units(model)[0].down.weight[:, :10] = 0
    shrink_(model)
    with pytest.raises(ValueError, match="different sizes already"):
        prune_(model, NEURONS, "magnitude")
    for units in find_units(model)[1:]:
        units.down.weight[:, :3] = 0
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"blocks of one size, and .* 54 neurons"):
        shrink_(model, uniform=True)
    assert shapes == {name: value.shape for name, value in model.state_dict().items()}


def test_what_makes_blocks_differ_is_refused() -> None:
    model = tiny_model("llama")
    batches = tiny_batches("llama")
    with pytest.raises(ValueError, match="scope='global' blocks take different shares"):
        prune_(model, NEURONS, "magnitude", scope="global")
    with pytest.raises(ValueError, match="allocation='owl' blocks take different shares"):
        prune_(model, NEURONS, "wanda", batches, allocation="owl")
    with pytest.raises(ValueError, match="targets or ignore"):
        prune_(model, SparsityConfig("column", 0.5, "down_proj", uniform=True), "magnitude")
    with pytest.raises(ValueError, match="in training all units compete"):
        hf_sparse.sparse_param_groups(model, NEURONS)
    with pytest.raises(ValueError, match="pattern '2:4' has no such units"):
        SparsityConfig("2:4", uniform=True)
    with pytest.raises(ValueError, match="wanted True or False"):
        SparsityConfig("column", 0.5, uniform=1)  # type: ignore[arg-type]


def test_a_config_tells_it_only_where_it_is_asked_for() -> None:
    assert SparsityConfig.from_dict(NEURONS.to_dict()) == NEURONS
    assert repr(NEURONS) == "SparsityConfig('column', sparsity=0.25, uniform=True)"
    assert "uniform" not in SparsityConfig("column", 0.25).to_dict()


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_sparse.save_pretrained(tiny_model("llama"), tmp_path / "dense")
    dense, pruned, small = (str(tmp_path / name) for name in ("dense", "pruned", "small"))
    how = ["--pattern", "head", "--method", "magnitude", "--uniform"]
    assert main(["prune", dense, pruned, *how, "--sparsity", "0.5"]) == 0
    capsys.readouterr()
    assert main(["shrink", pruned, small, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plain"] is True
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (config["model_type"], config["num_attention_heads"]) == ("llama", 2)
