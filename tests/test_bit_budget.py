"""Which layers stay out of a grid of few bits, for a budget of bytes."""

from __future__ import annotations

import itertools

import pytest
import torch

import hf_sparse
from hf_sparse import SparsityConfig, byte_budget
from hf_sparse.byte_budget import LayerBits, _kept
from hf_sparse.structure.grids import check_grid
from tests.support.tiny_models import tiny_batches, tiny_model


def measured(budget: float = 0.3, **options):
    model = tiny_model("llama")
    return model, hf_sparse.bit_budget(model, budget, tiny_batches("llama"), **options)


def test_errors_are_those_of_the_output_when_one_layer_is_rounded():
    model, plan = measured()
    batch = tiny_batches("llama")[0]
    with torch.no_grad():
        model.eval()
        wanted = model(**batch).logits
        worst = max(plan.layers, key=lambda layer: layer.error)
        rounded = tiny_model("llama").eval()
        assert torch.equal(rounded(**batch).logits, wanted)
        hf_sparse.quantize_(rounded, bits=4, group_size=32)
        only = tiny_model("llama").eval()
        weight = rounded.get_parameter(f"{worst.name}.weight")
        only.get_parameter(f"{worst.name}.weight").copy_(weight)
        error = (only(**batch).logits - wanted).square().sum() / wanted.square().sum()
    # The plan's scales know the norms of the inputs, and it has seen more batches.
    assert worst.error == pytest.approx(float(error), rel=0.5)


def test_the_plan_keeps_to_the_budget_and_changes_nothing():
    model, plan = measured(0.3)
    before = tiny_model("llama").state_dict()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert 0.2 < plan.fraction <= 0.3
    assert plan.kept
    assert plan.error < sum(layer.error for layer in plan.layers)
    assert set(plan.kept) <= set(plan.config.ignore)
    assert plan.kept[0] in str(plan)
    assert f"{len(plan.kept)} of {len(plan.layers)}" in repr(plan)


def test_the_model_that_a_plan_gives_has_both_kinds_of_weights():
    model, plan = measured(0.3)
    before = {name: model.get_parameter(f"{name}.weight").clone() for name in plan.kept}
    report = hf_sparse.quantize_(model, plan.config)
    check_grid(model, plan.config)
    for name, weight in before.items():
        assert torch.equal(model.get_parameter(f"{name}.weight"), weight)
    assert len(report.tensors) == len(plan.layers) - len(plan.kept)
    stayed = f"{len(plan.kept)} layers stay as they are, by ignore: {plan.kept[0]}"
    assert stayed in str(report)


@pytest.mark.slow
def test_a_whole_budget_keeps_all_layers_and_a_tight_one_none():
    model, whole = measured(1.0)
    assert len(whole.kept) == len(whole.layers)
    least = sum(layer.few for layer in whole.layers) / sum(layer.nbytes for layer in whole.layers)
    _, tight = measured(least + 1e-6)
    assert not tight.kept
    with pytest.raises(ValueError, match=r"budget 0\.100 cannot be kept: .* take 0\.1[0-9]+ of"):
        hf_sparse.bit_budget(model, 0.1, tiny_batches("llama"))


def test_each_layer_is_rounded_once(monkeypatch):
    real, seen = byte_budget.rounded, []
    monkeypatch.setattr(byte_budget, "rounded", lambda *given: (seen.append(1), real(*given))[1])
    _, plan = measured()
    assert len(seen) == len(plan.layers)
    quantised = tiny_model("llama")
    report = hf_sparse.quantize_(quantised, bits=4, group_size=32, batches=tiny_batches("llama"))
    bits = sum(one.bits * one.numel for one in report.tensors) / 8
    assert sum(layer.few for layer in plan.layers) == pytest.approx(bits, rel=0.01)


def test_no_choice_of_as_many_bytes_is_much_better():
    """Against all subsets: the greedy choice loses at most what one layer is worth."""
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        errors = torch.rand(8, generator=random).tolist()
        sizes = torch.randint(100, 1000, (8,), generator=random).tolist()
        pairs = enumerate(zip(errors, sizes, strict=True))
        layers = [LayerBits(str(i), error, size, size // 8) for i, (error, size) in pairs]
        room = 0.5 * sum(sizes) - sum(layer.few for layer in layers)
        best = max(
            sum(layer.error for layer in subset)
            for count in range(9)
            for subset in itertools.combinations(layers, count)
            if sum(layer.nbytes - layer.few for layer in subset) <= room
        )
        chosen = [layer for layer in _kept(layers, 0.5) if layer.is_kept]
        assert sum(layer.nbytes - layer.few for layer in chosen) <= room
        assert sum(layer.error for layer in chosen) >= best - max(errors)


def test_promised_zeros_are_refused():
    model = tiny_model("llama")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    with pytest.raises(ValueError, match=r"promised SparsityConfig\('2:4'\).*Take the dense model"):
        hf_sparse.bit_budget(model, 0.5, tiny_batches("llama"))
    with pytest.raises(ValueError, match="group_size 128 does not divide"):
        measured(group_size=128)
