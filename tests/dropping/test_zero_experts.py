"""Zero experts that `shrink_` removes: the model is what `drop_experts_` leaves, or nothing changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_sparse
from hf_sparse import SparsityConfig, drop_experts_, prune_, shrink_
from hf_sparse.provenance.record import provenance_of
from hf_sparse.pruning.methods import EXPERT_METHODS
from hf_sparse.structure.mixtures import Mixtures
from tests.support.crosses import cross
from tests.support.mixtures import MIXTURES, grouped_mixture, mixture_batches, tiny_mixture

QUARTER = SparsityConfig("expert", 0.25)


def with_zero_experts(family: str, *numbers: tuple[int, ...], **changes: Any) -> PreTrainedModel:
    """A mixture whose experts of these numbers are zero, for each block."""
    model = tiny_mixture(family, num_hidden_layers=len(numbers), **changes)
    with torch.no_grad():
        for mixture, own in zip(Mixtures.of(model).mixtures, numbers, strict=True):
            for parameter in mixture.stack.module.parameters():
                parameter[list(own)] = 0
    return model


@pytest.mark.few(1)
@cross("family, method", MIXTURES, EXPERT_METHODS)
def test_pruned_and_shrunk_is_what_drop_experts_leaves(
    family: str, method: str, tmp_path: Path
) -> None:
    data = mixture_batches() if EXPERT_METHODS[method].needs_calibration else None
    model, dropped = tiny_mixture(family), tiny_mixture(family)
    prune_(model, QUARTER, method, data)
    report = shrink_(model)
    other = drop_experts_(dropped, 0.25, data, by=method)
    assert report.removed == other.removed  # type: ignore[union-attr]
    assert report.experts == (4, 3)  # type: ignore[union-attr]
    assert model.config.to_dict() == dropped.config.to_dict()
    for name, tensor in dropped.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    ids = mixture_batches(1)[0]
    assert torch.equal(model(ids).logits, dropped(ids).logits)
    assert [step.method for step in provenance_of(model).steps] == [method, "shrink"]
    hf_sparse.save_pretrained(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config.model_type == model.config.model_type  # a plain model
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_the_same_function_where_no_token_is_sent_to_them() -> None:
    model = with_zero_experts("mixtral", (1,), (3,))
    ids = mixture_batches(1)[0]
    pruned = copy.deepcopy(model)
    # Routers that never choose the experts that are zero.
    for (gone,), block in zip(((1,), (3,)), pruned.model.layers, strict=True):  # type: ignore[union-attr]
        gate: Any = block.mlp.gate

        def forward(hidden: Any, gate: Any = gate, gone: int = gone) -> Any:
            logits = torch.nn.functional.linear(hidden, gate.weight)
            logits[:, gone] = -torch.inf
            top, chosen = logits.float().softmax(-1).topk(gate.top_k, dim=-1)
            return logits, top / top.sum(-1, keepdim=True), chosen

        gate.forward = forward
    shrink_(model)
    torch.testing.assert_close(model(ids).logits, pruned(ids).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_report_tells_that_tokens_go_elsewhere() -> None:
    model = with_zero_experts("mixtral", (1,), (3,))
    before = model(mixture_batches(1)[0]).logits
    report = shrink_(model)
    assert "go to others now" in str(report)
    assert (before - model(mixture_batches(1)[0]).logits).abs().max() > 1e-3


def test_different_numbers_are_refused_or_made_alike() -> None:
    model = with_zero_experts("mixtral", (0, 1), (3,))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"would keep 2 or 3 of 4 experts.*uniform=True"):
        shrink_(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    report = shrink_(model, uniform=True)
    assert report.removed == ((0,), (3,))  # type: ignore[union-attr]
    assert "1 experts are zero and stay" in str(report)
    assert model.config.num_local_experts == 3


def test_a_token_still_gets_its_experts() -> None:
    model = with_zero_experts("mixtral", (0, 1, 2), (1, 2, 3))
    with pytest.raises(ValueError, match=r"each token is given 2.*nearest that is possible is 2"):
        shrink_(model)
    assert shrink_(model, uniform=True).experts == (4, 2)  # type: ignore[union-attr]
    model = with_zero_experts("mixtral", (0,), ())
    with pytest.raises(ValueError, match="some block has too few that are zero"):
        shrink_(model, uniform=True)


def test_groups_lose_as_many_each() -> None:
    model = grouped_mixture()
    prune_(model, QUARTER, "magnitude")
    uneven = copy.deepcopy(model)
    assert shrink_(model).experts == (8, 6)  # type: ignore[union-attr]
    mixture = Mixtures.of(uneven).mixtures[0]
    with torch.no_grad():
        for name in mixture.stack.parameters:
            getattr(mixture.stack.module, name)[:2] = 0
    with pytest.raises(ValueError, match="transformers builds them with one number"):
        shrink_(uneven)


def test_a_promise_of_other_zeros_stays() -> None:
    model = tiny_mixture("mixtral")
    prune_(model, SparsityConfig("2:4"), "magnitude")
    with torch.no_grad():
        for mixture in Mixtures.of(model).mixtures:
            for name in mixture.stack.parameters:
                getattr(mixture.stack.module, name)[3] = 0
    shrink_(model)
    assert hf_sparse.measure_sparsity(model).pattern == "2:4"
    assert hf_sparse.measure_sparsity(model).violations == 0


def test_without_zero_experts_nothing_changes() -> None:
    model = tiny_mixture("mixtral")
    with pytest.raises(ValueError, match="MixtralForCausalLM"):
        shrink_(model)
