"""A part of a model by itself, and encoder-decoders whose decoder's inputs cannot be made."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import hf_sparse
from hf_sparse import SparsityConfig, prune_, shrink_
from hf_sparse.structure.units import find_units
from tests.support.tiny_models import tiny_model


def test_the_units_of_a_decoder_alone_are_those_of_the_model() -> None:
    whole = tiny_model("opt")
    decoder = copy.deepcopy(whole.model.decoder)
    assert [units.name for units in find_units(decoder)] == ["layers.0", "layers.1", "layers.2"]
    for model in (whole, decoder):
        for pattern in ("head", "column"):
            prune_(model, SparsityConfig(pattern, 0.5), "magnitude")
        shrink_(model)
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, whole.model.decoder.state_dict()[name])


def test_a_decoder_alone_is_stored_dense_or_not_at_all(tmp_path: Path) -> None:
    decoder = tiny_model("opt").model.decoder
    prune_(decoder, SparsityConfig("2:4"), "magnitude")
    with pytest.raises(ValueError, match="AutoModel would build a OPTModel"):
        hf_sparse.save_pretrained(decoder, tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()
    hf_sparse.save_pretrained(decoder, tmp_path / "dense", SparsityConfig("2:4", format="dense"))
    loaded = type(decoder).from_pretrained(tmp_path / "dense")
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("call", ["wanda", "drop_blocks_"])
def test_labels_need_a_token_to_begin_with(call: str) -> None:
    config = {**tiny_model("t5").config.to_dict(), "decoder_start_token_id": None}
    model = T5ForConditionalGeneration(T5Config(**config)).eval()
    ids = torch.randint(2, 200, (2, 12))
    batch = {"input_ids": ids, "labels": ids}
    calls = {
        "wanda": lambda: prune_(model, SparsityConfig("2:4"), "wanda", [batch]),
        "drop_blocks_": lambda: hf_sparse.drop_blocks_(model, 1, [batch]),
    }
    with pytest.raises(ValueError, match=r"no decoder_start_token_id.*put decoder_input_ids"):
        calls[call]()
    prune_(model, SparsityConfig("2:4"), "wanda", [{"input_ids": ids, "decoder_input_ids": ids}])
    model.config.decoder_start_token_id = 0
    prune_(model, SparsityConfig("2:4"), "wanda", [batch])
