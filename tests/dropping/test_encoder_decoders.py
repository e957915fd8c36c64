"""drop_blocks_ of encoder-decoders: each list has its own number in the config, and keeps a block."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hf_sparse
from hf_sparse import drop_blocks_
from hf_sparse.structure.depth import Depth
from tests.support.any_models import build, tiny_config

COUNTS = ("num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
CLASSES = {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}


def deep(model_type: str) -> Any:
    """An encoder-decoder of three and three blocks."""
    config = copy.deepcopy(tiny_config(model_type))
    for name in COUNTS:
        if name in vars(config):
            setattr(config, name, 3)
    config.decoder_start_token_id = 0
    return build(config, getattr(transformers, CLASSES[model_type]))


def batches() -> list[dict[str, torch.Tensor]]:
    """Inputs with padding, and labels of another length."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 200, (2, 9), generator=generator)
    labels = torch.randint(4, 200, (2, 5), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return [{"input_ids": ids, "attention_mask": mask, "labels": labels}]


@torch.no_grad()
def loss_of(model: Any) -> float:
    return float(model(**batches()[0], use_cache=False).loss)


def without(model: Any, place: tuple[str, int]) -> Any:
    """The model without a block, taken from its list by hand."""
    other = copy.deepcopy(model)
    del other.get_submodule(place[0])[place[1]]
    return other


@pytest.mark.few(1)
@pytest.mark.parametrize("model_type", CLASSES)
def test_the_blocks_of_both_halves_compete(model_type: str, tmp_path: Path) -> None:
    model = deep(model_type)
    places = Depth.of(model).places
    losses = [loss_of(without(model, place)) for place in places]
    if model_type == "t5":  # the first blocks hold the table of positions
        losses[0] = losses[3] = float("inf")
    best = losses.index(min(losses))
    report = drop_blocks_(model, 1, batches())
    assert report.removed == (best,)
    assert report.scores[0] == pytest.approx(losses[best], abs=1e-5)
    assert report.names[best] == "{}.{}".format(*places[best])
    assert report.options["removed"] == report.names[best]
    assert "has to stay" in str(report) or model_type != "t5"
    drop_blocks_(model, 2, batches(), by="similarity")
    counts = {name: getattr(model.config, name) for name in COUNTS if name in vars(model.config)}
    assert sum(counts.values()) == 3
    hf_sparse.save_pretrained(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in counts} == counts
    assert type(loaded.config).model_type == model_type
    assert loss_of(loaded) == pytest.approx(loss_of(model), abs=1e-5)
    ids = batches()[0]["input_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert loaded.generate(ids, **settings).tolist() == model.generate(ids, **settings).tolist()


def test_every_list_keeps_a_block() -> None:
    model = deep("bart")
    drop_blocks_(model, 4, batches())
    assert (model.config.encoder_layers, model.config.decoder_layers) == (1, 1)
    with pytest.raises(ValueError, match="cannot tell a model without one of these blocks"):
        drop_blocks_(model, 1, batches())


def test_labels_are_needed_for_the_loss() -> None:
    model = deep("t5")
    unlabelled = [{"input_ids": batches()[0]["input_ids"]}]
    with pytest.raises(ValueError, match="the batches have no labels"):
        drop_blocks_(model, 1, unlabelled)
    assert len(Depth.of(model).blocks) == 6


def test_attention_and_networks_that_are_blocks_of_their_own_go_alone() -> None:
    config = tiny_config("nemotron_h")
    model = build(config, transformers.NemotronHForCausalLM)
    kinds = list(model.config.layers_block_type)
    attention = kinds.index("full_attention")
    Depth.of(model).keep_([number for number in range(len(kinds)) if number != attention])
    assert "full_attention" not in model.config.layers_block_type
    assert len(model.config.layers_block_type) == len(kinds) - 1
