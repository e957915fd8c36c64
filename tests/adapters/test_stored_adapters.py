"""Adapters on the disk: what is damaged, or belongs to another model, is refused and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_sparse
from hf_sparse import get_peft_model, load_adapter
from hf_sparse.cli import main
from hf_sparse.recovery.training import train as train_recovery
from hf_sparse.upstream.peft_by_name import has_adapters
from tests.adapters.test_adapters import lora, outputs, shira, train
from tests.support.closeness import same
from tests.support.sparse_models import sparse_model
from tests.support.tiny_models import tiny_batches, tiny_model

peft = pytest.importorskip("peft")

KINDS = {"lora": lora, "shira": shira}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A trained adapter of each kind."""
    model = get_peft_model(sparse_model(), KINDS[request.param]())
    train(model)
    model.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS, {"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(folder: Path, message: str, model: Any = None) -> None:
    """The error comes, and the model is as it was."""
    model = sparse_model() if model is None else model
    before = outputs(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert not has_adapters(model)
    assert same(outputs(model), before)


def test_missing_and_unexpected_tensors(folder: Path) -> None:
    names = sorted(load_file(folder / WEIGHTS))
    change_weights(folder, lambda t: {name: t[name] for name in names[1:]})
    refused(
        folder, rf"1 of its tensors are missing \(first {names[0]}\); wanted {len(names)} tensors"
    )
    change_weights(folder, lambda t: {"x": torch.zeros(64)})
    refused(folder, rf"{len(names)} of .* missing .*, 1 of its tensors are unexpected \(first x\)")


def test_an_adapter_of_more_layers(folder: Path) -> None:
    layers = sparse_model().config.num_hidden_layers
    refused(folder, "tensors are missing", sparse_model(num_hidden_layers=layers + 1))
    refused(folder, "tensors are unexpected", sparse_model(num_hidden_layers=layers - 1))


@pytest.mark.parametrize("kind", KINDS)
def test_modules_to_save_under_another_name(kind: str, tmp_path: Path) -> None:
    base = sparse_model(tie_word_embeddings=False)
    model = get_peft_model(base, KINDS[kind](modules_to_save=["lm_head"]), "mine")
    train(model)
    found = outputs(model)
    model.save_pretrained(tmp_path)
    folder = tmp_path / "mine"
    loaded = load_adapter(sparse_model(tie_word_embeddings=False), folder, "other")
    assert same(outputs(loaded), found)
    [head] = [name for name in load_file(folder / WEIGHTS) if "lm_head" in name]
    change_weights(folder, lambda t: {name: t[name] for name in t if name != head})
    refused(folder, rf"tensor '{head}' is missing", sparse_model(tie_word_embeddings=False))


def test_embeddings_beside_an_adapter_are_expected(folder: Path) -> None:
    name = "base_model.model.model.embed_tokens.weight"
    weight = sparse_model().model.embed_tokens.weight.detach()
    wanted = outputs(load_adapter(sparse_model(), folder))
    change_weights(folder, lambda t: {**t, name: weight.clone()})
    assert same(outputs(load_adapter(sparse_model(), folder)), wanted)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": []},
        {"r": "x"},
        {"r": 0},
        {"lora_alpha": "x"},
        {"lora_alpha": float("nan")},
        {"lora_dropout": 1.5},
        {"bias": "weird"},
        {"target_modules": 5},
        {"target_modules": ".*("},
        {"exclude_modules": ["q_proj", 5]},
        {"modules_to_save": 5},
        {"rank_pattern": {"q_proj": "x"}},
        {"base_model_name_or_path": 5},
    ],
)
def test_settings_that_cannot_be(folder: Path, changes: dict[str, Any]) -> None:
    change_config(folder, **changes)
    [name] = changes
    refused(folder, rf"{folder}/adapter_config\.json has {name}=.*; wanted ")


@pytest.mark.few(1)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_weights_that_are_cut_off(folder: Path, share: float) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: int(share * len(whole))])
    refused(folder, rf"{folder} .* cannot be read")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused(folder, rf"{folder} .* cannot be read")


def test_a_base_with_other_zeros(folder: Path) -> None:
    fewer = sparse_model()
    weight = fewer.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight.view(-1)[(weight.view(-1) == 0).nonzero()[0]] = 1.0
    for other in (tiny_model("llama"), fewer):
        refused(folder, "zeros are at other places", other)
    load_adapter(sparse_model(), folder)


def test_a_base_whose_zeros_are_changed_under_shira() -> None:
    model = get_peft_model(sparse_model(), shira())
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.fill_(1.0)
    with pytest.raises(ValueError, match="zeros are not those that adapter 'default' was made for"):
        hf_sparse.merge_adapters_(model)


def test_shira_and_stock_peft(tmp_path: Path) -> None:
    model = get_peft_model(sparse_model(), shira())
    train(model)
    model.save_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match=r"\['base_zeros'\] .* ignored"):
        stock = peft.PeftModel.from_pretrained(sparse_model(), tmp_path / "ours")
    assert same(outputs(stock), outputs(model))
    stock.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="holds no hash of its base model's zeros"):
        again = load_adapter(sparse_model(), tmp_path / "theirs")
    assert same(outputs(again), outputs(model))


def trained_weights(model: Any) -> list[Tensor]:
    return [parameter.data for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.few(2)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_in_a_file(folder: Path, bad: float) -> None:
    def spoilt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: v * bad if v.is_floating_point() else v for n, v in tensors.items()}

    change_weights(folder, spoilt)
    refused(folder, rf"adapter 'default' of {folder} has values that are not finite")


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_are_not_merged_or_saved(kind: str, tmp_path: Path) -> None:
    model = get_peft_model(sparse_model(), KINDS[kind]())
    train(model)
    trained_weights(model)[-1].view(-1)[0] = float("nan")
    for merge in (
        hf_sparse.merge_adapters_,
        lambda m: hf_sparse.save_pretrained(m, tmp_path / "out"),
    ):
        with pytest.raises(
            ValueError, match=r"'default' has values that are not finite, in 1 places"
        ):
            merge(model)
        assert model.peft_config
    assert not (tmp_path / "out").exists()


def test_a_scale_that_is_not_finite() -> None:
    model = sparse_model()
    with pytest.raises(ValueError, match=r"not finite, .* the scale of "):
        get_peft_model(model, lora(lora_alpha=float("nan")))
    assert not has_adapters(model)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_that_overflows(kind: str) -> None:
    model = get_peft_model(sparse_model().half(), KINDS[kind]())
    for weight in trained_weights(model):
        weight.fill_(1e5)
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        hf_sparse.merge_adapters_(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recovery_that_diverges_in_its_last_step(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(recovery: Any, trained: Any, *args: Any, **kwargs: Any) -> list[float]:
        losses = train_recovery(recovery, trained, *args, **kwargs)
        trained_weights(trained)[0].fill_(float("nan"))
        return losses

    monkeypatch.setattr("hf_sparse.recovery.rates.train", diverging)
    model = sparse_model()
    before = outputs(model)
    with pytest.raises(ValueError, match="has values that are not finite"):
        hf_sparse.recover_(model, tiny_batches("llama")[:1], kind, r=1)
    assert not has_adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert same(outputs(model), before)


@pytest.mark.parametrize("shift", [lambda p: p + 1000, lambda p: -p - 1, lambda p: p[:, 1:]])
def test_places_that_are_not_in_the_layer(shift: Any, tmp_path: Path) -> None:
    get_peft_model(sparse_model(), shira()).save_pretrained(tmp_path)

    def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: v if v.is_floating_point() else shift(v).contiguous()
            for name, v in tensors.items()
        }

    change_weights(tmp_path, moved)
    refused(
        tmp_path, r"has places of shape .* for base_model\..*_proj \(\d+ x \d+\) that are no rows"
    )


def test_a_damaged_adapter_is_not_pushed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_config(folder, base_model_name_or_path=5)
    assert main(["push", str(folder), "user/never"]) == 1
    assert "base_model_name_or_path=5; wanted a text" in capsys.readouterr().err
