"""Checkpoints of unlike families pruned from disk to disk: the same zeros as in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import hf_sparse
from hf_sparse import SparsityConfig
from tests.support.any_models import build, tiny_config
from tests.support.mixtures import tiny_mixture

torch.set_num_threads(1)
HALF = SparsityConfig("unstructured", 0.5)


def batches(decoder: bool) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 200, (2, 8), generator=generator) for _ in range(2)]
    return [{"input_ids": i, **({"decoder_input_ids": i} if decoder else {})} for i in ids]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("model_type", "auto_class"),
    [
        ("llama4_text", AutoModelForCausalLM),  # sends tokens where its embeddings are
        ("t5", AutoModelForSeq2SeqLM),  # has one matrix under several names
    ],
)
def test_streamed_zeros_are_those_of_memory(
    model_type: str, auto_class: Any, tmp_path: Path
) -> None:
    config = tiny_config(model_type)
    dense = build(config, auto_class._model_mapping[type(config)])
    dense.save_pretrained(tmp_path / "dense")
    data = batches(decoder=auto_class is AutoModelForSeq2SeqLM)
    streamed = hf_sparse.prune_checkpoint(
        tmp_path / "dense", tmp_path / "sparse", HALF, "wanda", data
    )
    in_memory = hf_sparse.prune_(dense, HALF, "wanda", data)
    assert streamed.zeros == in_memory.zeros
    assert streamed.parameters == in_memory.parameters == dense.num_parameters()
    loaded = auto_class.from_pretrained(tmp_path / "sparse")
    for name, value in dense.state_dict().items():
        equal = (value == 0) == (loaded.state_dict()[name] == 0)
        assert equal.float().mean() > 0.99, name
        kept = (value != 0) & equal
        torch.testing.assert_close(value[kept], loaded.state_dict()[name][kept])


def test_a_model_on_the_disk_with_tied_weights_is_saved_again(tmp_path: Path) -> None:
    config = tiny_config("t5")
    model = build(config, AutoModelForSeq2SeqLM._model_mapping[type(config)])
    hf_sparse.prune_(model, HALF, "magnitude")
    hf_sparse.save_pretrained(model, tmp_path / "sparse")
    on_disk = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "sparse", device_map={"": "disk"}, offload_folder=str(tmp_path / "offload")
    )
    hf_sparse.save_pretrained(on_disk, tmp_path / "again")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again")
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["experts", "layers"])
def test_weights_that_a_class_does_not_tie_are_refused_in_words(tmp_path: Path, kind: str) -> None:
    model = tiny_mixture("mixtral")
    first, second = model.model.layers
    if kind == "experts":
        second.mlp.experts.down_proj = first.mlp.experts.down_proj
    else:
        second.self_attn.o_proj.weight = first.self_attn.o_proj.weight
    hf_sparse.prune_(model, HALF, "magnitude")
    with pytest.raises(ValueError, match=r"one in memory.*model\.layers\.0.*model\.layers\.1"):
        hf_sparse.save_pretrained(model, tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()
    part, name = (
        (second.mlp.experts, "down_proj")
        if kind == "experts"
        else (second.self_attn.o_proj, "weight")
    )
    setattr(part, name, nn.Parameter(getattr(part, name).clone()))
    hf_sparse.save_pretrained(model, tmp_path / "sparse")
