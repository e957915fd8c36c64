"""Mixtures larger than memory: a few experts' Gram matrices at a time, blocks from the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.calibration import input_statistics
from hf_sparse.calibration.input_statistics import Grams, Norms
from hf_sparse.files.work_folder import _beside
from hf_sparse.pruning import on_disk
from hf_sparse.structure.layers import block_layers
from tests.support.closeness import nearly_same
from tests.support.mixtures import EXPERTS, MIXTURES, mixture_batches, tiny_mixture

ONE_EXPERT = 8 * (32**2 + 48**2)


def experts_alone(model: Any) -> list[Any]:
    return [layer for layer in block_layers(model) if layer.stack is not None]


@pytest.mark.parametrize("room", [0, 1, 2, 5])
def test_passes_keep_within_their_bytes_and_leave_nothing_out(room: int) -> None:
    layers = block_layers(tiny_mixture("mixtral"))
    grams = Grams()
    parts = grams.passes(layers, room * ONE_EXPERT)
    assert sorted(layer.name for part in parts for layer in part) == sorted(x.name for x in layers)
    assert [x.name for x in layers if x.stack is None] == [x.name for x in parts[0]][:8]
    for part in parts[1:]:
        assert sum(map(grams.size, part)) <= max(room * ONE_EXPERT, 8 * 48**2)
    for part in parts[1:-1] if room else []:
        assert sum(map(grams.size, part)) == room * ONE_EXPERT


def test_norms_of_all_experts_are_seen_in_one_pass() -> None:
    assert len(Norms().passes(experts_alone(tiny_mixture("mixtral")))) == 1


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_many_passes_give_the_result_of_one(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [tiny_mixture("gpt_oss") for _ in range(2)]
    passes, seen = Grams.passes, []

    def few(self: Grams, layers: Any) -> Any:
        seen.append(passes(self, layers, ONE_EXPERT))
        return seen[-1]

    hf_sparse.prune_(models[0], SparsityConfig("2:4"), method, mixture_batches())
    monkeypatch.setattr(Grams, "passes", few)
    hf_sparse.prune_(models[1], SparsityConfig("2:4"), method, mixture_batches())
    assert [len(parts) for parts in seen] == [1 + EXPERTS] * 2
    for one, other in zip(*map(block_layers, models), strict=True):
        assert nearly_same(one.weight, other.weight), one.name


def test_experts_without_tokens_are_told_and_pruned_by_magnitude() -> None:
    model = tiny_mixture("mixtral")

    def first_two(module: Any, args: Any, output: Any) -> Any:
        logits, weights, numbers = output
        return logits, weights, numbers % 2

    model.model.layers[0].mlp.gate.register_forward_hook(first_two)
    dense = {layer.name: layer.weight.clone() for layer in block_layers(model)}
    report = hf_sparse.prune_(model, SparsityConfig("2:4"), "sparsegpt", mixture_batches())
    idle = [note for note in report.notes if "saw no calibration token" in note]
    assert len(idle) == 1
    assert idle[0].startswith("model.layers.0.mlp.experts.gate_up_proj.2 and 3 more")
    weight = model.model.layers[0].mlp.experts.down_proj[3]
    before = dense["model.layers.0.mlp.experts.down_proj.3"]
    kept = SparsityConfig("2:4").pattern.keep(before.abs(), 0.5)
    assert torch.equal(weight, before * kept)


def test_experts_that_saw_few_tokens_get_more_damping_and_are_one_line_of_the_report() -> None:
    model = tiny_mixture("mixtral")
    report = hf_sparse.prune_(model, SparsityConfig("2:4"), "sparsegpt", mixture_batches(1, 12))
    told = [note for note in report.notes if "saw fewer calibration tokens than" in note]
    assert len(told) == 1
    assert "damping was raised in this proportion, from 0.01" in told[0]
    assert not any("saw only" in note for note in report.notes)


def test_norms_of_few_tokens_are_told() -> None:
    model = tiny_mixture("mixtral")
    report = hf_sparse.prune_(model, SparsityConfig("2:4"), "wanda", mixture_batches(1, 12))
    assert any("saw fewer than 32 calibration tokens" in note for note in report.notes)


@pytest.mark.few(1)
@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_is_pruned_from_disk_to_disk_as_in_memory(family: str, tmp_path: Path) -> None:
    model, config = tiny_mixture(family), SparsityConfig("2:4")
    model.save_pretrained(tmp_path / "dense")
    report = hf_sparse.prune_checkpoint(
        tmp_path / "dense", tmp_path / "sparse", config, "sparsegpt", mixture_batches()
    )
    wanted = hf_sparse.prune_(model, config, "sparsegpt", mixture_batches())
    assert report.tensors == wanted.tensors
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for one, other in zip(block_layers(back), block_layers(model), strict=True):
        assert nearly_same(one.weight, other.weight), one.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "sparse"]


@pytest.mark.slow
def test_a_stopped_run_over_experts_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = tiny_mixture("qwen3_moe"), SparsityConfig("2:4")
    model.save_pretrained(tmp_path / "dense")
    arguments = (tmp_path / "dense", tmp_path / "sparse", config, "sparsegpt", mixture_batches())
    finish = on_disk.OnDisk.finish

    def stop(self: Any, step: Any) -> None:
        if step.name.endswith(".1"):
            raise KeyboardInterrupt
        finish(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(on_disk.OnDisk, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            hf_sparse.prune_checkpoint(*arguments)
    work = _beside(tmp_path / "sparse")
    assert sorted(path.name for path in work.iterdir()) == [
        "model.layers.0.safetensors",
        "run.json",
        "sparsities.json",
    ]
    hf_sparse.prune_checkpoint(*arguments, resume=True)
    hf_sparse.prune_checkpoint(arguments[0], tmp_path / "whole", *arguments[2:])
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("sparse", "whole")]
    for one, other in zip(*map(block_layers, models), strict=True):
        assert nearly_same(one.weight, other.weight), one.name


def test_a_changed_source_is_noticed_in_the_experts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_mixture("qwen3_moe")
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    arguments = (
        tmp_path / "dense",
        tmp_path / "sparse",
        SparsityConfig("2:4"),
        "wanda",
        mixture_batches(),
    )

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("hf_sparse.pruning.streaming.save_model", stop)
        with pytest.raises(KeyboardInterrupt):
            hf_sparse.prune_checkpoint(*arguments)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1] += 1.0
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    with pytest.raises(ValueError, match="another source"):
        hf_sparse.prune_checkpoint(*arguments, resume=True)


def test_the_bound_is_documented() -> None:
    assert input_statistics.LARGEST_SUMS == 1 << 30
    text = (Path(__file__).parents[2] / "docs" / "pruning.md").read_text()
    assert "Gram matrices of a mixture's experts" in text
