"""Recovery of quantised models: the loss falls, and weights end on their grids with their zeros."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse import SparsityConfig, prune_, quantize_, recover_
from hf_sparse.optim.straight_through import StraightThrough
from hf_sparse.quantization import Grid, OffGridError, codes_of
from hf_sparse.recovery.methods import RECOVERIES
from hf_sparse.structure.grids import check_grid, gridded
from hf_sparse.structure.layers import promised_config, target_layers
from tests.support.mixtures import tiny_mixture
from tests.support.tiny_models import prose, tiny_batches, tiny_model, tiny_tokenizer

OPTIONS: dict[str, dict[str, Any]] = {"shira": {"r": 4}, "lora": {"r": 4}, "finetune": {}}
SPARSE = SparsityConfig("2:4", bits=4, group_size=32, embedding_bits=8)
DENSE = SparsityConfig("unstructured", 0.0, bits=4, symmetric=False)


def windows() -> list[Any]:
    return hf_sparse.calibration_batches(
        tiny_tokenizer(), [prose()[:30_000]], num_samples=16, window=32
    )


def mean_loss(model: Any) -> float:
    with torch.no_grad():
        losses = [model(**batch, labels=batch["input_ids"]).loss for batch in windows()]
    return float(sum(losses)) / len(losses)


@pytest.mark.few(1)
@pytest.mark.parametrize("config", [SPARSE, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("method", RECOVERIES)
def test_the_loss_falls_and_grid_and_zeros_stay(method: str, config: SparsityConfig) -> None:
    pytest.importorskip("peft")
    model = tiny_model("llama")
    prune_(model, config, "magnitude")
    zeros = {layer.name: layer.weight == 0 for layer in target_layers(model)}
    before = mean_loss(model)
    report = recover_(model, windows(), method, epochs=3, lr=1e-2, **OPTIONS[method])
    check_grid(model, config)
    assert promised_config(model) == config
    assert mean_loss(model) < before - 0.02
    if config is SPARSE:
        assert report.violations == 0
        for layer in target_layers(model):
            assert not layer.weight[zeros[layer.name]].any()


def test_mixtures_stay_on_their_grid() -> None:
    model = tiny_mixture("qwen3_moe")
    config = SparsityConfig("2:4", bits=4)
    prune_(model, config, "magnitude")
    batches = tiny_batches("llama")
    recover_(model, batches, "finetune", lr=1e-2)
    check_grid(model, config)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_the_forward_pass_sees_is_on_the_grid_that_was_there(symmetric: bool) -> None:
    model = tiny_model("gpt2").requires_grad_(False)
    config = SparsityConfig("unstructured", 0.0, bits=4, group_size=32, symmetric=symmetric)
    quantize_(model, config)
    layers = gridded(model, config)
    start = copy.deepcopy(model.state_dict())
    training = StraightThrough(layers)
    training.round_()
    assert all(torch.equal(start[name], value) for name, value in model.state_dict().items())
    training.restore_()
    for layer, _ in layers:
        layer.weight.add_(0.003 * torch.randn(layer.weight.shape))
    moved = copy.deepcopy(model.state_dict())
    training.round_()
    for layer, grid in layers:
        first = codes_of(layer.part(start[layer.parameter_name]), grid)
        scales = first.scales.repeat_interleave(32, 1)
        codes = (layer.weight / scales).round()
        assert torch.equal(codes * scales, layer.weight)
        codes_of(layer.weight, grid)
        if symmetric:  # what is inside of the range is rounded, not clipped
            lost = (layer.weight - layer.part(moved[layer.parameter_name])).abs()
            assert (lost <= 0.501 * scales.abs())[codes.abs() < 7].all()
    training.restore_()
    assert all(torch.equal(moved[name], value) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_a_model_that_left_its_grid_is_refused_before_training() -> None:
    model = tiny_model("llama")
    quantize_(model, bits=8)
    target_layers(model)[0].weight[0, 0] += 0.01
    with pytest.raises(OffGridError, match="32 of 1,024 weights"):
        recover_(model, windows(), "finetune")


def test_an_ordinary_optimizer_is_warned_of() -> None:
    model = tiny_model("llama")
    prune_(model, SPARSE, "magnitude")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="their zeros are kept, their bits are not"):
        hf_sparse.keep_zeros_(optimizer, model)
    with pytest.raises(OffGridError):
        codes_of(torch.randn(4, 32), Grid(4, 32))
