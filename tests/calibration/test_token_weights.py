"""Tokens weighted by the loss: the weights, the Gram matrices, and what solvers make of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse import SparsityConfig, prune_
from hf_sparse.calibration.token_weights import WeightedTokens, token_weights
from hf_sparse.structure.targets import Targets
from tests.support.tiny_models import tiny_batches, tiny_classifier, tiny_model

CONFIG = SparsityConfig("2:4")


def squares(model: Any, name: str, batch: dict[str, Tensor]) -> Tensor:
    """The mean square of dL/dy of a layer for each token, by a leaf added to its output."""
    layer, held = model.get_submodule(name), []

    def add(module: Any, args: Any, output: Tensor) -> Tensor:
        held.append(torch.zeros_like(output, requires_grad=True))
        return output + held[0]

    handle = layer.register_forward_hook(add)
    model(**{"labels": batch["input_ids"], **batch}).loss.backward()
    handle.remove()
    return held[0].grad.square().mean(-1)  # type: ignore[union-attr]


def layers_of(model: Any) -> list[Any]:
    return list(Targets.of(model, CONFIG).layers)


def test_weights_are_the_gradients_of_the_outputs() -> None:
    model, batches = tiny_model("llama").eval(), tiny_batches("llama", 2)
    found = token_weights(model, layers_of(model), batches, share=1.0)
    name = "model.layers.1.mlp.down_proj"
    wanted = torch.cat([squares(model, name, batch).flatten() for batch in batches])
    torch.testing.assert_close(found[name], wanted / wanted.mean(), rtol=0.05, atol=0.02)
    half = token_weights(model, layers_of(model), batches, share=0.5)
    for name, weights in found.items():
        torch.testing.assert_close(half[name], 0.5 + 0.5 * weights)
        assert float(weights.mean()) == pytest.approx(1, rel=1e-4)
    attention = "model.layers.0.self_attn."
    assert torch.equal(found[f"{attention}q_proj"], found[f"{attention}v_proj"])
    assert all(parameter.grad is None for parameter in tiny_model("llama").parameters())
    assert all(not module._forward_hooks for module in model.modules())


def test_padding_has_no_weight() -> None:
    model = tiny_classifier().eval()
    [batch] = tiny_batches("bert", 1, padded=True)
    batch = {**batch, "labels": torch.tensor([0, 2])}
    found = token_weights(model, layers_of(model), [batch])
    assert {len(weights) for weights in found.values()} == {int(batch["attention_mask"].sum())}


def recorded(model: Any, name: str, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """The inputs of a layer."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().flatten(0, -2))
    )
    for batch in batches:
        model(**batch)
    handle.remove()
    return seen


def test_the_mask_of_wanda_is_that_of_weighted_norms() -> None:
    model, batches = tiny_model("llama").eval(), tiny_batches("llama", 2)
    name = "model.layers.0.mlp.gate_proj"
    inputs = torch.cat(recorded(model, name, batches))
    config = SparsityConfig("2:4", targets=[name])
    layers = list(Targets.of(model, config).layers)
    weights = token_weights(model, layers, batches)[name]
    weight = model.get_submodule(name).weight.detach().clone()
    norms = (inputs.square() * weights[:, None]).sum(0).sqrt()
    scores = (weight.abs() * norms).view(-1, 4)
    kept = torch.zeros_like(scores).scatter_(1, scores.topk(2).indices, 1.0).view_as(weight)
    prune_(model, config, "wanda", batches, token_weights="loss")
    assert torch.equal(model.get_submodule(name).weight != 0, kept.bool())


def weighted_error(weight: Tensor, pruned: Tensor, inputs: Tensor, weights: Tensor) -> float:
    lost = (inputs.double() @ (weight - pruned).double().T).square().sum(-1)
    return float((lost * weights).sum())


@pytest.mark.few(1)
@pytest.mark.parametrize("options", [{}, {"refine": "swaps"}])
@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_solvers_lower_the_weighted_error(method: str, options: dict[str, str]) -> None:
    torch.manual_seed(3)
    model = tiny_model("llama").eval()
    batches = [{"input_ids": torch.randint(9, 90, (2, 64))} for _ in range(2)]
    name = "model.layers.1.mlp.down_proj"
    config = SparsityConfig("2:4", targets=[name])
    inputs = torch.cat(recorded(model, name, batches))
    layers = list(Targets.of(model, config).layers)
    # weights as far from equal as the loss may make them: errors of the two prunings must differ
    weights = token_weights(model, layers, batches)[name]
    assert float(weights.max() / weights.min()) > 1.5
    dense = model.get_submodule(name).weight.detach().clone()
    errors = []
    for chosen in (None, "loss"):
        twin = copy.deepcopy(model)
        more = {} if chosen is None else {"token_weights": chosen}
        report = prune_(twin, config, method, batches, **options, **more)
        assert ("token_weights" in report.options) == bool(chosen)
        pruned = twin.get_submodule(name).weight.detach()
        errors.append(weighted_error(dense, pruned, inputs, weights))
    assert errors[1] < errors[0] * 1.001


def test_weights_go_to_inputs_in_their_order() -> None:
    given = WeightedTokens({"a": torch.tensor([4.0, 9.0, 16.0])})
    ones = torch.ones(2, 3)
    assert given.weighted("a", ones)[:, 0].tolist() == [2, 3]
    assert given.weighted("a", ones[:1])[:, 0].tolist() == [4]
    with pytest.raises(ValueError, match="is given other tokens in its block"):
        given.weighted("a", ones)
    given.restart()
    assert given.weighted("a", ones)[:, 0].tolist() == [2, 3]
    assert given.weighted("b", ones) is ones


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("wanda", {"token_weights": "los"}, "wanted None or one of loss"),
        ("magnitude", {"token_weights": "loss"}, "looks at no errors of layers"),
    ],
)
def test_bad_options(method: str, options: dict[str, str], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        prune_(model, CONFIG, method, tiny_batches("llama"), **options)


def test_a_model_without_a_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="have no labels"):
        prune_(tiny_model("bert"), CONFIG, "wanda", tiny_batches("bert"), token_weights="loss")


def test_a_checkpoint_that_streams_is_refused(tmp_path: Any) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="takes gradients through the whole model"):
        hf_sparse.prune_checkpoint(
            tmp_path / "dense",
            tmp_path / "out",
            CONFIG,
            "wanda",
            tiny_batches("llama"),
            token_weights="loss",
        )
