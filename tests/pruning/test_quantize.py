"""quantize_: what it rounds, what it leaves alone, and what it refuses before any work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import SparsityConfig, prune_, quantize_
from hf_sparse.provenance.record import provenance_of
from hf_sparse.quantization import Grid, OffGridError, codes_of
from hf_sparse.structure.grids import check_grid, embedding_layers
from hf_sparse.structure.layers import promised_config, target_layers
from tests.support.mixtures import tiny_mixture
from tests.support.tiny_models import tiny_batches, tiny_classifier, tiny_model

INT4: dict[str, Any] = {"bits": 4, "group_size": 32}


def zeros_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {layer.name: layer.weight == 0 for layer in target_layers(model)}


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["llama", "gpt2", "albert", "t5", "bert"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("data", [True, False])
def test_dense_models_of_every_kind_come_onto_the_grid(
    family: str, symmetric: bool, data: bool
) -> None:
    model = tiny_model(family)
    batches = tiny_batches(family) if data else None
    report = quantize_(model, bits=4, symmetric=symmetric, embedding_bits=8, batches=batches)
    wanted = SparsityConfig("unstructured", 0.0, bits=4, symmetric=symmetric, embedding_bits=8)
    check_grid(model, wanted)
    assert promised_config(model) == wanted
    assert report.method == ("gptq" if data else "nearest")
    assert len(report.tensors) == len(target_layers(model)) + len(embedding_layers(model))
    assert 0 < report.error < 0.02
    assert 4 < report.bits < 9.5
    assert "bits a weight" in str(report)
    (step,) = provenance_of(model).steps
    assert (step.method, dict(step.options)["bits"]) == ("quantize", 4)


@pytest.mark.few(1)
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("method", [None, "nearest"])
@pytest.mark.parametrize("data", [True, False])
def test_zeros_of_sparse_models_stay(pattern: str, method: str | None, data: bool) -> None:
    model = tiny_model("llama")
    prune_(model, SparsityConfig(pattern, 0.5), "magnitude")
    before = zeros_of(model)
    batches = tiny_batches("llama") if data else None
    quantize_(model, **INT4, batches=batches, method=method)
    after = zeros_of(model)
    assert all(bool(after[name][zeros].all()) for name, zeros in before.items())
    assert promised_config(model) == SparsityConfig(pattern, 0.5, **INT4)
    check_grid(model, SparsityConfig(pattern, 0.5, **INT4))


@pytest.mark.slow
def test_zeros_that_nobody_promised_are_counted_before_rounding_adds_some() -> None:
    model = tiny_model("llama")
    for layer in target_layers(model):
        layer.weight[:, ::2] = 0
    quantize_(model, bits=8)
    assert promised_config(model) == SparsityConfig("unstructured", 0.5, bits=8)


def test_data_lower_the_error_of_the_outputs() -> None:
    dense = tiny_model("llama").requires_grad_(False)
    batches = tiny_batches("llama", count=8)
    wanted = [dense(**batch).logits for batch in batches]
    lost = {}
    for method in ("nearest", "gptq"):
        model = copy.deepcopy(dense)
        quantize_(model, **INT4, batches=batches, method=method)
        found = [model(**batch).logits for batch in batches]
        pairs = zip(found, wanted, strict=True)
        lost[method] = sum(float((one - other).square().sum()) for one, other in pairs)
    assert lost["gptq"] < 0.8 * lost["nearest"]


def test_a_second_call_changes_nothing() -> None:
    model = tiny_model("llama")
    quantize_(model, **INT4, embedding_bits=8, batches=tiny_batches("llama"))
    before = copy.deepcopy(model.state_dict())
    quantize_(model, **INT4, embedding_bits=8)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_embeddings_can_follow_later_and_tied_ones_stay_tied() -> None:
    model = tiny_model("llama")
    quantize_(model, **INT4)
    quantize_(model, embedding_bits=8)
    assert promised_config(model) == SparsityConfig("unstructured", 0.0, **INT4, embedding_bits=8)
    check_grid(model, SparsityConfig("unstructured", 0.0, **INT4, embedding_bits=8))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    untied = tiny_model("mistral")
    quantize_(untied, embedding_bits=4)
    for layer in embedding_layers(untied):
        codes_of(layer.weight, Grid(4))
    assert len(embedding_layers(untied)) == 2
    with pytest.raises(OffGridError):
        check_grid(untied, SparsityConfig("unstructured", 0.0, bits=4))


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_are_rounded_each_on_its_own(family: str) -> None:
    model = tiny_mixture(family)
    quantize_(model, bits=4, batches=tiny_batches("llama"))
    check_grid(model, SparsityConfig("unstructured", 0.0, bits=4))


@pytest.mark.slow
def test_targets_are_those_of_the_config() -> None:
    model = tiny_model("llama")
    quantize_(model, SparsityConfig("unstructured", 0.0, targets="down_proj", bits=8))
    on = [layer for layer in target_layers(model) if layer.name.endswith("down_proj")]
    for layer in target_layers(model):
        if layer in on:
            codes_of(layer.weight, Grid(8))
        else:
            with pytest.raises(OffGridError):
                codes_of(layer.weight, Grid(8))


def test_a_changed_weight_is_told_with_numbers() -> None:
    model = tiny_model("llama")
    quantize_(model, **INT4)
    layer = target_layers(model)[3]
    layer.weight[0, 0] += 0.01
    with pytest.raises(
        OffGridError, match=rf"{layer.weight_name}: 32 of [\d,]+ weights lie"
    ) as one:
        check_grid(model, promised_config(model))
    assert one.value.weights == 32
    target_layers(model)[5].weight[:, 0] += 0.01
    with pytest.raises(OffGridError, match="of 2 of 21 layers are off their grids"):
        check_grid(model, promised_config(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no bits are given"),
        ({"group_size": 32}, "no bits are given"),
        ({"bits": 5}, "wanted 8 or 4"),
        ({"bits": 4, "group_size": 128}, "128 does not divide the 32 inputs"),
        ({"bits": 4, "group_size": 48}, "wanted 128, 64 or 32"),
        ({"bits": "4"}, "bits is '4'"),
        ({"bits": 8, "method": "gptq"}, "needs batches"),
        ({"bits": 8, "method": "best"}, "method"),
        ({"config": SparsityConfig("2:4")}, "tells no bits"),
        ({"config": SparsityConfig("2:4", bits=4)}, "quantize_ makes no zeros"),
        ({"config": SparsityConfig("unstructured", 0.5, bits=4)}, "quantize_ makes no zeros"),
        ({"config": SparsityConfig("unstructured", 0.0, bits=4), "bits": 4}, "into the config"),
        ({"bits": 4, "batches": []}, "batch"),
    ],
)
def test_what_cannot_be_done_is_told_before_any_work(
    arguments: dict[str, Any], message: str
) -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        quantize_(model, **arguments)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert promised_config(model) is None
    assert not provenance_of(model).steps


@pytest.mark.slow
@pytest.mark.parametrize("again", [{"bits": 8}, {"bits": 4, "symmetric": False}])
def test_another_grid_on_top_is_refused(again: dict[str, Any]) -> None:
    model = tiny_model("llama")
    quantize_(model, **INT4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"is quantised already \(int4, groups of 32\)"):
        quantize_(model, **again)
    with pytest.raises(ValueError, match="is quantised already"):
        prune_(model, SparsityConfig("2:4", **again), "magnitude")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():  # trained: it is on no grid any more
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))
    quantize_(model, **again)


def test_models_without_plain_values_are_refused() -> None:
    dense = tiny_model("llama")
    with torch.device("meta"):
        model = type(dense)(dense.config)
    with pytest.raises(ValueError, match="meta device"):
        quantize_(model, bits=8)
    broken = tiny_model("llama")
    target_layers(broken)[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_(broken, bits=8)
    compiled = torch.compile(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"torch\.compile"):
        quantize_(compiled, bits=8)


def test_embeddings_that_groups_do_not_divide_are_named() -> None:
    model = tiny_model("albert")
    with pytest.raises(ValueError, match=r"word_embeddings.*32 does not divide the 16 inputs"):
        quantize_(model, **INT4, embedding_bits=8)
    quantize_(model, **INT4)  # its shared blocks, once


@pytest.mark.slow
def test_classifiers_keep_their_heads() -> None:
    model = tiny_classifier()
    head = model.classifier.weight.detach().clone()
    quantize_(model, bits=8, embedding_bits=8)
    assert torch.equal(model.classifier.weight, head)
    codes_of(model.get_input_embeddings().weight.detach(), Grid(8))


@pytest.mark.slow
def test_small_weights_keep_their_size() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(2.0**-30)
    before = weight.detach().clone()
    quantize_(model, bits=8)
    assert (weight - before).norm() < 0.02 * before.norm()


def test_weights_at_the_end_of_their_type_are_refused() -> None:
    model = copy.deepcopy(tiny_model("llama")).half()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 65504
    with pytest.raises(ValueError, match=r"up_proj\.weight has a weight of 65504, too large"):
        quantize_(model, bits=8)
