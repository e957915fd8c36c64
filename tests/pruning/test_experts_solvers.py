"""Experts are pruned as if each matrix were a layer of its own, on the tokens that reach it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.calibration.input_statistics import Grams
from hf_sparse.calibration.walk import run_model
from hf_sparse.structure.layers import block_layers
from tests.support.closeness import nearly_same, same
from tests.support.crosses import cross
from tests.support.mixtures import MIXTURES, mixture_batches, separated, tiny_mixture

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "wanda": {},
    "taylor": {},
    "sparsegpt": {},
    "alps": {},
    "sparsellm": {},
    "prox_local": {},
    "proxsparse": {"relative_lr": 0.001},
}
COMPOSED: dict[str, tuple[str, dict[str, Any]]] = {
    "swaps": ("wanda", {"refine": "swaps"}),
    "reconstructed": ("wanda", {"reconstruct": 1}),
}


def pruned_both_ways(
    family: str, config: SparsityConfig, method: str, **options: Any
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each matrix of a mixture, pruned in its stack and as a Linear."""
    model = tiny_mixture(family)
    reference = separated(model)
    batches = None if method == "magnitude" else mixture_batches()
    for one in (model, reference):
        hf_sparse.prune_(one, config, method, batches, **options)
    wanted = {layer.name: layer.weight for layer in block_layers(reference)}
    return [(layer.name, layer.weight, wanted[layer.name]) for layer in block_layers(model)]


@pytest.mark.few(1)
@cross("family, method", MIXTURES, METHODS)
def test_every_method_prunes_experts_as_it_prunes_linear_layers(family: str, method: str) -> None:
    pairs = pruned_both_ways(family, SparsityConfig("2:4"), method, **METHODS[method])
    for name, weight, wanted in pairs:
        assert nearly_same(weight.contiguous(), wanted, 0.95), name
        assert int((weight == 0).sum()) == weight.numel() // 2


@pytest.mark.few(1)
@pytest.mark.parametrize("composed", COMPOSED)
def test_what_follows_a_method_works_on_experts_as_on_linear_layers(composed: str) -> None:
    method, options = COMPOSED[composed]
    pairs = pruned_both_ways("gpt_oss", SparsityConfig("2:4"), method, **options)
    for name, weight, wanted in pairs:
        assert nearly_same(weight.contiguous(), wanted, 0.95), name


def test_columns_of_experts_are_refitted() -> None:
    config = SparsityConfig("column", 0.25, targets=["down_proj.*"])
    pairs = pruned_both_ways("mixtral", config, "wanda", refine="refit")
    assert all(nearly_same(weight, wanted, 0.95) for _, weight, wanted in pairs)


@pytest.mark.parametrize("allocation", ["owl", "alpha"])
def test_blocks_share_the_sparsity_by_their_experts_too(allocation: str) -> None:
    config = SparsityConfig("unstructured", 0.6)
    pairs = pruned_both_ways("mixtral", config, "wanda", allocation=allocation)
    for name, weight, wanted in pairs:
        assert abs(int((weight == 0).sum()) - int((wanted == 0).sum())) <= 2, name


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_an_expert_sees_the_tokens_of_its_router_whatever_runs_it(implementation: str) -> None:
    model = tiny_mixture("qwen3_moe")
    model.set_experts_implementation(implementation)
    reference = separated(model)
    batches = [{"input_ids": ids} for ids in mixture_batches()]
    sums = {}
    for one in (model, reference):
        grams = Grams()
        with grams.collecting(block_layers(one)):
            run_model(one, batches, grams)
        sums[one is model] = {
            layer.name: (seen.statistic, seen.tokens)
            for seen in grams.groups()
            for layer in seen.layers
        }
    assert sums[True].keys() == sums[False].keys()
    for name, (gram, tokens) in sums[True].items():
        assert tokens == sums[False][name][1], name
        assert same(gram, sums[False][name][0], rtol=1e-3, atol=1e-4), name


def test_tokens_that_the_attention_mask_leaves_out_reach_no_expert() -> None:
    model = tiny_mixture("mixtral")
    ids = mixture_batches(1)[0]
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    found = []
    for batch in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1]}):
        grams = Grams()
        layers = [layer for layer in block_layers(model) if ".experts." in layer.name]
        with grams.collecting(layers):
            run_model(model, [batch], grams)
        found.append(sum(seen.tokens for seen in grams.groups()))
    assert found == [(24 + 10) * 2 * 2 * 2, 24 * 2 * 2 * 2]  # tokens, experts, matrices, blocks
