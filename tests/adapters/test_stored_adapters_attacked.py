"""Files of adapters with values of other kinds, ranks beyond reason, and names that match nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_sparse
from hf_sparse import get_peft_model, load_adapter
from hf_sparse.adapters.stored import _SETTINGS
from hf_sparse.upstream.peft_by_name import has_adapters
from tests.optim.test_frozen import sparse_model
from tests.support.tiny_models import tiny_model
from tests.support.unchanged import unchanged

peft = pytest.importorskip("peft")

KINDS = {"lora": peft.LoraConfig, "shira": peft.ShiraConfig}
WEIGHTS = "adapter_model.safetensors"


def saved(folder: Path, kind: str, model: Any = None, **settings: Any) -> Path:
    model = sparse_model() if model is None else model
    config = KINDS[kind](**{"r": 2, "target_modules": ["q_proj"], **settings})
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def changed(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def refused(folder: Path, message: str, model: Any = None) -> None:
    """The error comes, and the model is as it was."""
    model = sparse_model() if model is None else model
    with unchanged(model), pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert not has_adapters(model)


def test_every_switch_of_peft_has_a_row_in_the_table_of_settings() -> None:
    switches = {
        field.name
        for config in KINDS.values()
        for field in fields(config)
        if isinstance(field.default, bool)
    }
    assert switches <= set(_SETTINGS)


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["inference_mode", "fan_in_fan_out"])
@pytest.mark.parametrize("value", ["x", 1, None, []])
def test_switches_that_are_neither_true_nor_false(
    kind: str, name: str, value: Any, tmp_path: Path
) -> None:
    folder = changed(saved(tmp_path, kind), **{name: value})
    refused(folder, f"has {name}=.*; wanted true or false")


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": "x"},
        {"lora_bias": 1},
        {"masked": "yes"},
        {"init_lora_weights": 3},
        {"layers_to_transform": "x"},
        {"layers_to_transform": [-1]},
        {"trainable_token_indices": ["x"]},
        {"base_zeros": 5},
    ],
)
def test_settings_of_lora_that_cannot_be(changes: dict[str, Any], tmp_path: Path) -> None:
    [name] = changes
    refused(changed(saved(tmp_path, "lora"), **changes), f"has {name}=.*; wanted ")


@pytest.mark.parametrize("seed", ["x", 1.5, 2**64])
def test_a_seed_of_shira_that_cannot_be(seed: Any, tmp_path: Path) -> None:
    refused(changed(saved(tmp_path, "shira"), random_seed=seed), "has random_seed=.*; wanted")


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool])
def test_whole_numbers_in_the_place_of_floats(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = saved(tmp_path, kind)
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name, tensor in sorted(tensors.items()) if tensor.is_floating_point())
    tensors[name] = torch.ones_like(tensors[name]).to(dtype)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    refused(folder, f"is damaged: its tensor {name} is of {dtype}; wanted floats")


@pytest.mark.parametrize("change", [lambda t: t.float(), lambda t: t > 0])
def test_places_that_are_no_whole_numbers(
    change: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    folder = saved(tmp_path, "shira")
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in sorted(tensors) if "indices" in name)
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    refused(folder, f"its tensor {name} is of .*; wanted whole numbers")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_rank_is_refused_before_tensors_of_it_are_made(kind: str, tmp_path: Path) -> None:
    refused(changed(saved(tmp_path, kind), r=10**9), "its settings have rank 1000000000, and none")


def test_a_stored_rank_of_one_layer_is_refused_before_tensors_of_it_are_made(
    tmp_path: Path,
) -> None:
    folder = changed(saved(tmp_path, "lora"), rank_pattern={"q_proj": 10**9})
    refused(folder, "its settings have rank 1000000000, and none")


@pytest.mark.parametrize(
    "settings", [{"r": 10**9}, {"rank_pattern": {"q_proj": 10**9}}], ids=["r", "rank_pattern"]
)
def test_a_rank_is_refused_before_tensors_of_it_are_made(settings: dict[str, Any]) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], **settings)
    with pytest.raises(ValueError, match="rank 1000000000 is more than any layer has use for"):
        get_peft_model(sparse_model(), config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [["nope"], "nope.*"])
def test_targets_that_name_no_layer_are_told_with_the_layers_there_are(
    kind: str, targets: Any, tmp_path: Path
) -> None:
    message = "no layer is left to adapt: target_modules=.*nope.*Its layers: q_proj, k_proj"
    with pytest.raises(ValueError, match=message):
        get_peft_model(sparse_model(), KINDS[kind](target_modules=targets))
    refused(changed(saved(tmp_path, kind), target_modules=targets), message)


@pytest.mark.parametrize(
    "settings", [{"exclude_modules": ["q_proj"]}, {"layers_to_transform": [99]}]
)
def test_settings_that_leave_out_every_target_are_told(settings: dict[str, Any]) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], **settings)
    with pytest.raises(ValueError, match="no layer is left to adapt"):
        get_peft_model(sparse_model(), config)


def test_modules_to_save_that_name_no_module_are_refused() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["nope"])
    with pytest.raises(ValueError, match=r"modules_to_save=\['nope'\] names no module"):
        get_peft_model(sparse_model(), config)


def test_a_second_adapter_on_the_same_layers_is_still_made() -> None:
    model = get_peft_model(sparse_model(), peft.LoraConfig(target_modules=["q_proj"]))
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    assert set(get_peft_model(model, config, "second").peft_config) == {"default", "second"}


def pruned_gpt2(method: str = "magnitude") -> Any:
    model = tiny_model("gpt2")
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), method)
    return model


def test_biases_of_a_refused_adapter_do_not_stay_in_the_model(tmp_path: Path) -> None:
    trained = get_peft_model(
        pruned_gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], bias="all")
    )
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.endswith("bias"):
                parameter += 1.0
    trained.save_pretrained(tmp_path)
    other = pruned_gpt2()
    with torch.no_grad():
        other.transformer.h[0].attn.c_attn.weight[0] = 0
    refused(tmp_path, "zeros are at other places", other)


def test_a_bias_setting_without_biases_in_the_file_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "lora", pruned_gpt2(), target_modules=["c_attn"])
    refused(changed(folder, bias="all"), "tensors are missing", pruned_gpt2())
