"""measure_sparsity against counts by hand on tiny random models, and the report's texts."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.counts import (
    SparsityReport,
    TensorSparsity,
    count_zeros,
    format_table,
    measure_sparsity,
)
from hf_sparse.patterns import Pattern
from hf_sparse.pruning.oneshot import prune_

SIZES = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES["intermediate_size"] = 32


def bert():
    return BertModel(BertConfig(**SIZES, max_position_embeddings=8))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=24, n_positions=8, n_embd=16, n_layer=2, n_head=2))


def albert():
    return AlbertModel(AlbertConfig(**SIZES, embedding_size=8, max_position_embeddings=8))


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True))


# Where the names of the weights inside the blocks begin, and how many such matrices there are.
BLOCKS = {
    bert: ("encoder.layer.", 12),
    gpt2: ("transformer.h.", 8),
    albert: ("encoder.albert_layer_groups.", 6),
    llama: ("model.layers.", 14),
}


def sparse(make_model):
    """A tiny model in which a random part of every parameter is zero."""
    torch.manual_seed(0)
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
            parameter.mul_(torch.rand(parameter.shape) < 0.6)
    return model


def block_weights(model, prefix):
    """The 2-D weights of the blocks by name, as stored."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if name.startswith(prefix) and parameter.ndim == 2
    }


@pytest.mark.parametrize("make_model", BLOCKS)
def test_zeros_equal_a_count_by_hand(make_model):
    model = sparse(make_model)
    prefix, number = BLOCKS[make_model]
    weights = block_weights(model, prefix)
    report = measure_sparsity(model)
    assert len(report.tensors) == len(weights) == number
    for tensor in report.tensors:
        weight = weights[tensor.name]
        assert tensor.zeros == sum(value == 0 for value in weight.flatten().tolist())
        assert sorted(tensor.shape) == sorted(weight.shape)
        assert tensor.numel == weight.numel()
        assert tensor.sparsity == tensor.zeros / weight.numel()
    assert report.zeros == sum(int((weight == 0).sum()) for weight in weights.values())
    assert report.numel == sum(weight.numel() for weight in weights.values())
    assert report.sparsity == report.zeros / report.numel
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    everything = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    assert report.model_zeros == report.zeros + report.other_zeros == everything > report.zeros
    assert report.model_sparsity == everything / report.parameters
    assert (report.pattern, report.violations) == ("unstructured", 0)


@pytest.mark.parametrize("make_model", BLOCKS)
def test_violations_equal_a_count_by_hand(make_model):
    model = sparse(make_model)
    weights = block_weights(model, BLOCKS[make_model][0])
    report = measure_sparsity(model, SparsityConfig("2:4"))
    for tensor in report.tensors:
        weight = weights[tensor.name]
        rows = (weight.T if make_model is gpt2 else weight).tolist()
        groups = [row[start : start + 4] for row in rows for start in range(0, len(row), 4)]
        assert tensor.violations == sum(4 - group.count(0) > 2 for group in groups)
    assert report.violations == sum(tensor.violations for tensor in report.tensors) > 0


def test_groups_of_conv1d_run_along_in_features():
    model = sparse(gpt2)
    layer = model.transformer.h[0].mlp.c_fc
    layer.weight.data = torch.zeros(16, 64)
    layer.weight.data[::2] = 1.0
    config = SparsityConfig("2:4", targets="h.0.mlp.c_fc")
    (tensor,) = measure_sparsity(model, config).tensors
    assert (tensor.shape, tensor.zeros, tensor.violations) == ((64, 16), 512, 0)
    layer.weight.data = torch.zeros(16, 64)
    layer.weight.data[:, ::2] = 1.0
    (tensor,) = measure_sparsity(model, config).tensors
    assert (tensor.zeros, tensor.violations) == (512, 128)


def test_a_shared_layer_counts_once():
    model = sparse(albert)
    model.config.num_hidden_layers = 6
    names = [tensor.name for tensor in measure_sparsity(model).tensors]
    assert len(names) == len(set(names)) == 6


def test_tied_weights_count_once():
    model = sparse(llama)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    report = measure_sparsity(model, SparsityConfig("2:4", targets=["lm_head", "embed_tokens"]))
    assert [tensor.name for tensor in report.tensors] == ["model.embed_tokens.weight"]
    assert report.numel == 24 * 16
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_targets_and_ignore_choose():
    model = sparse(llama)
    config = SparsityConfig(
        "unstructured", 0.5, ["q_proj", "layers.1.mlp.*"], ["layers.0.*", "up_proj"]
    )
    assert [tensor.name for tensor in measure_sparsity(model, config).tensors] == [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="'c_attn' matches no layer of BertModel") as raised:
        measure_sparsity(bert(), SparsityConfig("2:4", targets=["query", "c_attn"]))
    assert "encoder.layer.0.attention.self.query" in str(raised.value)


def test_a_config_that_ignores_every_target_is_refused():
    with pytest.raises(ValueError, match="no layer of BertModel is left"):
        measure_sparsity(bert(), SparsityConfig("2:4", ignore="*"))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear has no ModuleList"):
        measure_sparsity(nn.Linear(4, 4))


def test_a_weight_that_the_pattern_cannot_divide_is_named():
    with pytest.raises(ValueError, match=r"^encoder.layer.0.attention.self.query.weight: .*'1:7'"):
        measure_sparsity(bert(), SparsityConfig("1:7"))


def test_head_takes_its_size_from_the_model():
    model = sparse(bert)
    query = model.encoder.layer[0].attention.self.query.weight.data
    query[:] = 1.0
    query[8:] = 0.0
    config = SparsityConfig("head", 0.5, targets="layer.0.attention.self.query")
    report = measure_sparsity(model, config)
    assert (report.pattern, report.zeros, report.violations) == ("head:8", 128, 0)
    query[9, 3] = 1.0
    report = measure_sparsity(model, config)
    assert (report.violations, report.partial) == (0, 1)


def test_measuring_leaves_the_model_as_it_was():
    model = sparse(gpt2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure_sparsity(model, SparsityConfig("2:4"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_negative_zero_is_a_zero_and_nan_is_none():
    weight = torch.tensor([[-0.0, 0.0, float("nan"), 1.0]])
    assert count_zeros("w", weight, Pattern.parse("2:4")) == TensorSparsity("w", (1, 4), 2, 0)


def report_of_two():
    tensors = (TensorSparsity("first", (4, 8), 16, 3), TensorSparsity("b", (1000, 10), 2500, 0))
    options = {"lam": 0.1}
    return SparsityReport(tensors, "2:4", 20064, "magnitude", options, 1.25, ("a note",))


def test_to_json_holds_counts_and_totals():
    stored = json.loads(report_of_two().to_json())
    assert stored["tensors"] == [
        {"name": "first", "shape": [4, 8], "zeros": 16, "violations": 3, "partial": 0},
        {"name": "b", "shape": [1000, 10], "zeros": 2500, "violations": 0, "partial": 0},
    ]
    assert (stored["zeros"], stored["numel"], stored["violations"]) == (2516, 10032, 3)
    assert stored["sparsity"] == 2516 / 10032
    assert stored["model_sparsity"] == 2516 / 20064
    assert (stored["pattern"], stored["parameters"]) == ("2:4", 20064)
    assert (stored["method"], stored["options"]) == ("magnitude", {"lam": 0.1})
    assert (stored["seconds"], stored["notes"]) == (1.25, ["a note"])


def test_the_table():
    assert report_of_two().table().splitlines() == [
        "tensor   out x in  zeros  sparsity  violations",
        "------  ---------  -----  --------  ----------",
        "first       4 x 8     16    0.5000           3",
        "b       1000 x 10  2,500    0.2500           0",
        "2 tensors, pattern 2:4: 2,516 zeros in 10,032 weights (0.2508), 3 violations",
        "whole model: 2,516 zeros in 20,064 weights (0.1254)",
        "magnitude, lam=0.1: 1.2 s",
        "a note",
    ]


def test_without_a_config_the_blocks_are_counted_and_the_promise_is_checked():
    model = llama()
    before = measure_sparsity(model)
    assert before.pattern == "unstructured"
    prune_(model, SparsityConfig("2:4", targets=["q_proj"]), "magnitude")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, :4] = 1.0
    report = measure_sparsity(model)
    assert (report.pattern, report.violations) == ("2:4", 1)
    assert {tensor.name for tensor in report.tensors} == {tensor.name for tensor in before.tensors}
    assert measure_sparsity(model, SparsityConfig("2:4", targets=["q_proj"])).numel < report.numel


def test_the_table_of_a_model_has_a_row_for_each_tensor():
    report = measure_sparsity(model := sparse(bert))
    lines = report.table().splitlines()
    assert len(lines) == 2 + len(report.tensors) + 2
    for line, tensor in zip(lines[2:], report.tensors, strict=False):
        assert line.split()[0] == tensor.name
        assert f" {tensor.zeros:,} " in line
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    totals = f"{zeros:,} zeros in {report.parameters:,} weights ({zeros / report.parameters:.4f})"
    assert lines[-1] == f"whole model: {totals}"


def test_a_report_of_nothing_has_no_sparsity():
    report = SparsityReport((), "unstructured", 0)
    assert (report.sparsity, report.model_sparsity) == (0.0, 0.0)
    assert TensorSparsity("w", (0, 8), 0, 0).sparsity == 0.0
    assert "0 zeros in 0 weights (0.0000)" in str(report)


def test_format_table_aligns():
    assert format_table(("a", "b"), [("long", "1"), ("x", "22")]).splitlines() == [
        "a      b",
        "----  --",
        "long   1",
        "x     22",
    ]
