"""The norms of the inputs of layers, by which a budget is shared out: padding does not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse import budget
from hf_sparse.calibration import sensitivity
from hf_sparse.runtime.weights.rates import NOMINAL
from hf_sparse.structure.layers import target_layers
from tests.support.tiny_models import tiny_batches, tiny_model

PADDED = 3


def padded_batches(family: str) -> list[dict[str, Tensor]]:
    """Batches whose last tokens are padding in all sequences."""
    batches = []
    for batch in tiny_batches(family):
        ids = batch["input_ids"]
        mask = torch.ones_like(ids)
        mask[:, -PADDED:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def norms_by_hooks(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The reference: squares of what enters each layer at the tokens that count, in float64."""
    sums: dict[str, Tensor] = {}
    handles = []
    for layer in target_layers(model):

        def add(module: Any, inputs: tuple[Tensor], name: str = layer.name) -> None:
            seen = inputs[0][:, :-PADDED].double().flatten(0, 1)
            sums[name] = sums.get(name, 0) + seen.square().sum(dim=0)

        handles.append(layer.module.register_forward_pre_hook(add))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: total.sqrt() for name, total in sums.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "albert"])
def test_padding_does_not_count(family: str) -> None:
    model = tiny_model(family).eval()
    batches = padded_batches(family)
    found = sensitivity.input_norms(model, target_layers(model), batches)
    wanted = norms_by_hooks(model, batches)
    assert found.keys() == wanted.keys()
    for name, norm in found.items():
        torch.testing.assert_close(norm.double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_what_padding_holds_does_not_change_norms() -> None:
    model = tiny_model("llama").eval()
    batches = padded_batches("llama")
    others = [dict(batch) for batch in batches]
    for batch in others:
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][:, -PADDED:] = 1
    layers = target_layers(model)
    one, other = (sensitivity.input_norms(model, layers, given) for given in (batches, others))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_a_budget_is_shared_out_with_padded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "calibrate", lambda target, cache: NOMINAL["avx512"])
    model = tiny_model("albert").train()
    allocation = hf_sparse.allocate(model, "0.5x", padded_batches("albert"))
    assert allocation.fraction <= 0.5
    assert all(module.training for module in model.modules())
