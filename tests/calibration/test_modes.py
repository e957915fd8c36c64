"""Modes of a model that are switched for a while: every one comes back, on every exit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.calibration.modes import switched
from tests.support.tiny_models import tiny_batches, tiny_model, tiny_tokenizer


def mixed_model() -> Any:
    """A model in training mode with one block in eval mode, one frozen weight, and gradients."""
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    model.config.use_cache = True
    return model


def state(model: Any) -> list[Any]:
    """All that `switched` may change."""
    parameters = list(model.parameters())
    return [
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in parameters],
        [id(parameter.grad) if parameter.grad is not None else None for parameter in parameters],
        (
            model.config.use_cache,
            model.config.output_hidden_states,
            model.is_gradient_checkpointing,
        ),
        torch.is_grad_enabled(),
    ]


SWITCHES: dict[str, dict[str, Any]] = {
    "eval": {"training": False},
    "training": {"training": True},
    "settings": {"use_cache": False, "output_hidden_states": True, "no_such_setting": 1},
    "trained": {"trained": True},
    "checkpointing": {"trained": True, "checkpointing": True},
}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("fails", [False, True])
def test_every_mode_comes_back_on_every_exit(name: str, fails: bool) -> None:
    model = mixed_model()
    before = state(model)
    wanted = dict(SWITCHES[name])
    if "trained" in wanted:
        wanted["trained"] = [model.model.layers[0].mlp.up_proj.weight]
    try:
        with torch.no_grad(), switched(model, **wanted):
            assert torch.is_grad_enabled() == ("trained" in wanted)
            assert state(model) != before
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert state(model) == before


def test_only_what_is_trained_gets_gradients() -> None:
    model = mixed_model()
    chosen = model.model.layers[0].mlp.up_proj.weight
    [batch, *_] = tiny_batches("llama")
    with torch.no_grad(), switched(model, trained=[chosen]):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        assert [p is chosen for p in model.parameters() if p.grad is not None] == [True]
        assert (chosen.grad != 1).any()  # not added to what was there
    assert all((p.grad == 1).all() for p in model.parameters() if p.requires_grad)


def test_a_setting_that_a_config_does_not_have_is_not_made() -> None:
    model = mixed_model()
    with switched(model, no_such_setting=1):
        assert not hasattr(model.config, "no_such_setting")


CALLS = {
    "prune_": lambda m: hf_sparse.prune_(m, SparsityConfig("2:4"), "wanda", tiny_batches("llama")),
    "taylor": lambda m: hf_sparse.prune_(m, SparsityConfig("2:4"), "taylor", tiny_batches("llama")),
    "proxsparse": lambda m: hf_sparse.prune_(
        m, SparsityConfig("2:4"), "proxsparse", tiny_batches("llama"), gradient_checkpointing=True
    ),
    "perplexity": lambda m: hf_sparse.perplexity(
        m, tiny_tokenizer(), "one two three four five six seven " * 9, 8
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_leaves_each_module_in_its_own_mode(call: str) -> None:
    model = mixed_model()
    before = state(model)
    CALLS[call](model)
    assert state(model) == before


def test_recovery_leaves_each_module_in_its_own_mode() -> None:
    model = mixed_model()
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    before = state(model)
    hf_sparse.recover_(model, tiny_batches("llama"), method="finetune")
    assert state(model) == before
