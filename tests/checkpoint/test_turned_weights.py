"""Weights that a changed layout would turn round: square ones, of which no shape tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import FormatError, SparsityConfig
from hf_sparse.formats import compress, decompress
from tests.checkpoint.test_incomplete_checkpoints import READERS, change_tensors
from tests.support.mixtures import tiny_mixture
from tests.support.tiny_models import tiny_model

LAYERS = {"llama": "model.layers.0.self_attn.o_proj", "gpt2": "transformer.h.0.attn.c_proj"}


def flip(folder: Path, name: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        layout = tensors[f"{name}.layout"]
        layout[2] = 1 - layout[2]

    change_tensors(folder, change)


@pytest.mark.few(2)
@pytest.mark.parametrize("format", ["bitmask", "gap4", "gap8"])
@pytest.mark.parametrize("family", sorted(LAYERS))
def test_a_flag_of_an_unstructured_square_weight_is_refused(
    tmp_path: Path, family: str, format: str
) -> None:
    model, name = tiny_model(family), f"{LAYERS[family]}.weight"
    config = SparsityConfig("unstructured", 0.5, format=format)
    hf_sparse.prune_(model, config, "magnitude")
    folder = hf_sparse.save_pretrained(model, tmp_path / "model", config)
    flip(folder, name)
    for read in READERS:
        with pytest.raises(FormatError, match=rf"{name}.*transposed=1, its layer wants 0"):
            read(folder)
    loaded = getattr(hf_sparse, f"Sparse{type(model).__name__}")(model.config)
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    with pytest.raises(FormatError, match=rf"{name}.*transposed=1, its layer wants 0"):
        loaded.load_state_dict(load_file(folder / "model.safetensors"))
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_flag_of_a_square_stack_is_refused(tmp_path: Path, family: str) -> None:
    model = tiny_mixture(family, hidden_size=32, intermediate_size=32)
    hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5), "magnitude")
    folder = hf_sparse.save_pretrained(model, tmp_path)
    flip(folder, "model.layers.0.mlp.experts.down_proj")
    for read in READERS:
        with pytest.raises(FormatError, match="transposed=1, its layer wants 0"):
            read(folder)


@pytest.mark.parametrize("format", ["bitmask", "gap4", "gap8"])
def test_the_numbers_alone_are_read_with_either_flag(format: str) -> None:
    weight = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    parts = compress(weight, format)
    parts["layout"][2] = 1
    assert torch.equal(decompress(parts), weight.T)


def test_what_is_written_loads(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    folder = hf_sparse.save_pretrained(model, tmp_path)
    loaded = hf_sparse.SparseGPT2LMHeadModel(AutoModelForCausalLM.from_pretrained(folder).config)
    loaded.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
