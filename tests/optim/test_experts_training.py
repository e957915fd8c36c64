"""Sparse training of mixtures of experts: the same as of a model with a Linear for each matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.optim.parameters import sparse_parameters
from hf_sparse.structure.layers import block_layers
from tests.support.closeness import same
from tests.support.mixtures import EXPERTS, mixture_batches, separated, tiny_mixture


def give_gradients_(model: nn.Module) -> None:
    """The same gradient to each weight, in whatever parameter it is."""
    for layer in block_layers(model):
        if layer.parameter.grad is None:
            layer.parameter.grad = torch.zeros_like(layer.parameter)
        generator = torch.Generator().manual_seed(len(layer.name) + int(layer.name[-1:] == "1"))
        layer.part(layer.parameter.grad).copy_(torch.randn(layer.weight.shape, generator=generator))


@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    ("notation", "settings"),
    [
        ("unstructured", {"scale": "adaptive"}),
        ("2:4", {}),
        ("block:4x4", {}),
        ("column", {"penalty": "l0", "scale": "adaptive", "lam": 3.0}),
        ("row", {}),
    ],
)
def test_experts_are_shrunk_as_linear_layers_are(
    family: str, notation: str, settings: dict[str, Any]
) -> None:
    model = tiny_mixture(family)
    reference = separated(model)
    config = SparsityConfig(notation, None if notation == "2:4" else 0.5, targets=["experts.*"])
    for one in (model, reference):
        optimizer = hf_sparse.SparseAdamW(
            hf_sparse.sparse_param_groups(one, config), **{"lr": 0.01, "lam": 2.0, **settings}
        )
        for _ in range(2):
            give_gradients_(one)
            optimizer.step()
    wanted = {layer.name: layer.weight for layer in block_layers(reference)}
    for layer in block_layers(model):
        assert same(layer.weight.contiguous(), wanted[layer.name]), layer.name
    zeros = hf_sparse.measure_sparsity(model, config).zeros
    assert zeros == hf_sparse.measure_sparsity(reference, config).zeros > 0


@pytest.mark.few(2)
@pytest.mark.parametrize("method", ["proximal", "magnitude", "movement"])
@pytest.mark.parametrize("notation", ["2:4", "block:4x4"])
def test_a_sparsifier_reaches_the_sparsity_of_experts(method: str, notation: str) -> None:
    model = tiny_mixture("gpt_oss")
    config = SparsityConfig(notation, None if notation == "2:4" else 0.5)
    optimizer = hf_sparse.SparseAdamW(hf_sparse.sparse_param_groups(model, config), lr=1e-3)
    sparsifier = hf_sparse.Sparsifier(optimizer, config, 6, method=method)
    for ids in mixture_batches(1, 12) * 6:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    sparsifier.check()
    report = hf_sparse.measure_sparsity(model, config)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert report.violations == report.partial == 0


def test_matrices_of_a_stack_are_told_apart_by_name() -> None:
    model = tiny_mixture("mixtral")
    config = SparsityConfig("2:4", targets=["experts.*"])
    optimizer = hf_sparse.SparseAdamW(hf_sparse.sparse_param_groups(model, config), lr=1, lam=1)
    names = [sparse.name for sparse in sparse_parameters(optimizer)]
    assert len(names) == len(set(names)) == 2 * 2 * EXPERTS
    assert "model.layers.1.mlp.experts.down_proj.3" in names


def test_some_experts_of_a_stack_cannot_be_shrunk_alone() -> None:
    config = SparsityConfig("2:4", ignore=["experts.down_proj.1"])
    with pytest.raises(ValueError, match=r"3 of the 4 experts of .*down_proj are targets"):
        hf_sparse.sparse_param_groups(tiny_mixture("mixtral"), config)


def test_a_3_d_parameter_that_is_no_stack_is_still_refused_by_patterns_of_matrices() -> None:
    optimizer = torch.optim.SGD(nn.Conv1d(4, 4, 4).parameters(), lr=1)
    with pytest.raises(ValueError, match="wants matrices"):
        hf_sparse.add_shrinkage_(optimizer, pattern="2:4", lam=1)


def test_the_zeros_of_experts_stay_whatever_an_optimizer_does() -> None:
    model = tiny_mixture("gpt_oss")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    zeros = {layer.name: layer.weight == 0 for layer in block_layers(model)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    mask = hf_sparse.keep_zeros_(optimizer, model)
    for ids in mixture_batches(2, 12):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    mask.check()
    assert all(torch.equal(layer.weight == 0, zeros[layer.name]) for layer in block_layers(model))


@pytest.mark.parametrize("method", ["finetune", "lora"])
def test_recovery_keeps_the_zeros_of_experts(method: str) -> None:
    pytest.importorskip("peft")
    model = tiny_mixture("mixtral")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    zeros = {layer.name: layer.weight == 0 for layer in block_layers(model)}
    report = hf_sparse.recover_(model, mixture_batches(2, 12), method)
    assert all(torch.equal(layer.weight == 0, zeros[layer.name]) for layer in block_layers(model))
    told = [note for note in report.notes if "16 matrices of experts stay as they were" in note]
    assert len(told) == (method == "lora")


def test_adapters_on_nothing_but_experts_are_refused() -> None:
    pytest.importorskip("peft")
    model = tiny_mixture("mixtral")
    hf_sparse.prune_(model, SparsityConfig("2:4", targets=["experts.*"]), "magnitude")
    with pytest.raises(ValueError, match="Take method='finetune'"):
        hf_sparse.recover_(model, mixture_batches(2, 12), "lora")


def test_adapters_on_the_parameters_of_experts_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_mixture("mixtral")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    with pytest.raises(ValueError, match="target_parameters"):
        hf_sparse.get_peft_model(model, config)
