"""Checkpoints that contradict themselves: refused before anything is built from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertLMHeadModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

import hf_sparse
from hf_sparse import FormatError
from tests.checkpoint.test_incomplete_checkpoints import READERS, change_json, change_tensors, saved


@pytest.mark.parametrize(
    ("family", "other"),
    [("llama", "qwen2"), ("llama", "mistral"), ("qwen2", "qwen3"), ("bert", "albert")],
)
@pytest.mark.parametrize("sparse", [True, False])
def test_another_family_than_the_classes_is_refused(
    tmp_path: Path, family: str, other: str, sparse: bool
) -> None:
    """Its models may have weights that are not stored, and compute other things with the rest."""
    folder = saved(tmp_path / "model", family)
    change = {"model_type": f"sparse_{other}" if sparse else other}
    change_json(folder / "config.json", lambda values: values.update(change))
    for read in (AutoModel.from_pretrained, hf_sparse.inspect_checkpoint):
        with pytest.raises(FormatError, match=rf"model_type is .*{other}.*type '{family}'"):
            read(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_labels", 10**9), ("num_hidden_layers", 10**9), ("num_hidden_layers", 10**29)],
)
@pytest.mark.parametrize("family", ["qwen2", "bert"])
def test_counts_that_transformers_makes_lists_of_are_bounded(
    tmp_path: Path, family: str, name: str, value: int
) -> None:
    folder = saved(tmp_path / "model", family)

    def change(values: dict[str, Any]) -> None:
        values.pop("layer_types", None)
        values.pop("id2label", None)
        values[name] = value

    change_json(folder / "config.json", change)
    with pytest.raises(ValueError, match=rf"has {name}={value}"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(FormatError, match=rf"has {name}={value}"):
        hf_sparse.inspect_checkpoint(folder)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("family", "name", "twin"),
    [
        ("llama", "model.layers.0.input_layernorm.weight", "layers.0.input_layernorm.weight"),
        ("llama", "model.norm.weight", "model.model.norm.weight"),
        ("llama", "model.norm.weight", "norm.weight"),
        ("gpt2", "transformer.h.0.ln_1.weight", "h.0.ln_1.weight"),
        ("bert", "embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.weight"),
        ("bert", "embeddings.LayerNorm.weight", "embeddings.LayerNorm.gamma"),
        ("bert", "embeddings.LayerNorm.bias", "bert.embeddings.LayerNorm.beta"),
    ],
)
def test_a_weight_under_two_names_is_refused(
    tmp_path: Path, family: str, name: str, twin: str
) -> None:
    """transformers would take whichever it reads last."""
    folder = saved(tmp_path / "model", family)
    change_tensors(folder, lambda tensors: tensors.update({twin: 7 * tensors[name]}))
    auto_class = AutoModel if family == "bert" else AutoModelForCausalLM
    for read in (auto_class.from_pretrained, hf_sparse.inspect_checkpoint):
        with pytest.raises(FormatError, match="both are the same weight"):
            read(folder)


def test_weights_that_a_class_or_an_option_adds_to_blocks_are_not_made_up(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    for read, options in (
        (Qwen3ForCausalLM.from_pretrained, {}),
        (Qwen2ForCausalLM.from_pretrained, {}),
        (AutoModelForCausalLM.from_pretrained, {"attention_bias": True}),
        (AutoModelForCausalLM.from_pretrained, {"mlp_bias": True}),
    ):
        with pytest.raises(
            FormatError, match=r"has the weight layers\.\S+, but no tensor is stored"
        ):
            read(folder, **options)
    for read in READERS:
        read(folder)


@pytest.mark.filterwarnings("ignore")
def test_cross_attention_may_be_new(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "bert")
    model = BertLMHeadModel.from_pretrained(folder, is_decoder=True, add_cross_attention=True)
    encoder = AutoModel.from_pretrained(folder)
    found, wanted = model.bert.encoder.layer[1].output, encoder.encoder.layer[1].output
    assert torch.equal(found.dense.weight, wanted.dense.weight)
