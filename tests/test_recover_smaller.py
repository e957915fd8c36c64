"""Recovery of plain smaller models: those that lost blocks, heads or neurons have no zeros to keep."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparsityConfig, drop_blocks_, recover_, shrink_
from hf_sparse.provenance.record import provenance_of
from tests.support.tiny_models import tiny_batches, tiny_model


def whole() -> Any:
    """A Llama whose blocks matter to what it predicts."""
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(6) if parameter.ndim > 1 else None
    return model


def smaller(how: str) -> Any:
    """What is left of it without a block, or without half of the neurons."""
    model = whole()
    if how == "drop":
        drop_blocks_(model, 1, tiny_batches("llama"), by="similarity")
    else:
        hf_sparse.prune_(model, SparsityConfig("column", 0.5, uniform=True), "magnitude")
        shrink_(model)
    return model


@torch.no_grad()
def divergence(model: Any, teacher: Any) -> float:
    """KL(teacher || model), the mean over all tokens."""
    ids = tiny_batches("llama")[0]["input_ids"]
    mine, theirs = (each(ids).logits.double().log_softmax(-1) for each in (model, teacher))
    return float((theirs.exp() * (theirs - mine)).sum(-1).mean())


@pytest.mark.few(1)
@pytest.mark.parametrize("how", ["drop", "shrink"])
def test_a_smaller_model_learns_from_the_whole_one(how: str, tmp_path: Path) -> None:
    model, teacher = smaller(how), whole()
    before, parameters = divergence(model, teacher), model.num_parameters()
    windows = tiny_batches("llama")
    report = recover_(model, windows, teacher=teacher, epochs=8, accumulate=1, lr=1e-3, logits=1.0)
    assert divergence(model, teacher) < 0.8 * before
    assert report.options["distilled"] is True
    assert model.num_parameters() == parameters
    *_, smaller_by, last = provenance_of(model).steps
    assert smaller_by.method == {"drop": "drop_blocks", "shrink": "shrink"}[how]
    assert last.method == "recovery by finetune"
    hf_sparse.save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert divergence(loaded, model) < 1e-6


def test_a_smaller_model_without_history_is_known_by_its_teacher(tmp_path: Path) -> None:
    shrunk = smaller("drop")
    config = copy.deepcopy(shrunk.config)
    model = type(shrunk)(config)
    model.load_state_dict(shrunk.state_dict())
    with pytest.raises(ValueError, match="give the whole one as teacher"):
        recover_(model, tiny_batches("llama"))
    with pytest.raises(ValueError, match="has no zeros to keep"):  # the teacher is no larger
        recover_(tiny_model("llama"), tiny_batches("llama"), teacher=tiny_model("llama"))
    recover_(model, tiny_batches("llama"), teacher=tiny_model("llama"))


@pytest.mark.parametrize("method", ["lora", "shira"])
def test_adapters_that_keep_zeros_are_refused_where_there_are_none(method: str) -> None:
    pytest.importorskip("peft")
    model = smaller("drop")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Take method='finetune'"):
        recover_(model, tiny_batches("llama"), method, teacher=tiny_model("llama"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
