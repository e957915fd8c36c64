"""What runs on a GPU gives what the CPU gives. Skipped where torch sees no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_sparse
from hf_sparse import Distillation, SparsityConfig, prune_
from hf_sparse.formats import FORMATS, compress, decompress
from hf_sparse.optim.methods import TRAINING_METHODS
from hf_sparse.patterns import Pattern
from hf_sparse.structure.layers import target_layers
from tests.support.recipes import RECIPES, TRAINED
from tests.support.tiny_models import (
    prose,
    tiny_batches,
    tiny_classifier,
    tiny_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
GPU = torch.device("cuda", 0)
MORE = [
    ("unstructured", 0.5, {"method": "magnitude"}),
    ("block:4x1", 0.5, {"method": "sparsegpt"}),
    ("unstructured", 0.5, {"method": "wanda", "allocation": "alpha"}),
    ("unstructured", 0.5, {"method": "wanda", "refine": "swaps"}),
    ("4:8", None, {"method": "alps", "reconstruct": 1}),
    ("unstructured", 0.5, {"method": "sparsellm", "solver": "alps"}),
]


def equal_zeros(model: nn.Module, other: nn.Module) -> float:
    """The share of weights that are zero in both models or in neither."""
    pairs = zip(target_layers(model), target_layers(other), strict=True)
    masks = [(a.weight.cpu() == 0, b.weight.cpu() == 0) for a, b in pairs]
    return sum(int((a == b).sum()) for a, b in masks) / sum(a.numel() for a, _ in masks)


@pytest.mark.parametrize(("pattern", "sparsity", "options"), [*RECIPES, *MORE])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pruning_gives_the_masks_of_the_cpu(
    family: str, pattern: str, sparsity: float | None, options: dict[str, Any]
) -> None:
    config = SparsityConfig(pattern, sparsity)
    here, there = tiny_model(family), tiny_model(family).to(GPU)
    for model in (here, there):
        report = prune_(model, config, batches=tiny_batches(family, count=5), **options)
        assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert {parameter.device for parameter in there.parameters()} == {GPU}
    # Training, and keeping the better of two rounds, magnify the last bits of the sums.
    is_close = options.keys() & {*TRAINED, "solver"}
    assert equal_zeros(here, there) > (0.95 if is_close else 0.995)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "sparsellm"])
def test_blocks_visit_the_gpu_of_an_accelerator(method: str) -> None:
    here, visiting = tiny_model("llama"), tiny_model("llama")
    config = SparsityConfig("unstructured", 0.5)
    prune_(here, config, method, tiny_batches("llama"))
    prune_(visiting, config, method, tiny_batches("llama"), accelerator=Accelerator())
    assert {parameter.device.type for parameter in visiting.parameters()} == {"cpu"}
    assert equal_zeros(here, visiting) > 0.995


def test_a_gpu_model_is_saved_and_loaded_onto_the_gpu(tmp_path: Path) -> None:
    model = tiny_model("qwen2").to(GPU)
    config = SparsityConfig("unstructured", 0.7)
    prune_(model, config, "wanda", tiny_batches("qwen2"))
    hf_sparse.save_pretrained(model, tmp_path, config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": 0})
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
        assert loaded.state_dict()[name].device == GPU


@pytest.mark.parametrize("name", [n for n in FORMATS if n not in ("auto", "dense")])
def test_formats_restore_weights_that_were_on_the_gpu(name: str) -> None:
    pattern = Pattern.parse("2:4" if name == "nm" else "unstructured")
    weight = torch.randn(32, 64, device=GPU)
    weight *= pattern.keep(weight.abs(), 0.5)
    try:
        parts = compress(weight, name, pattern)
    except ValueError:
        pytest.skip("not a format for these zeros")
    restored = decompress(parts)
    assert torch.equal(restored.to(GPU), weight)


@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x1", "row", "2:4"])
@pytest.mark.parametrize("method", TRAINING_METHODS)
def test_sparse_training_reaches_its_target(
    method: str, pattern: str, foreach: bool | None
) -> None:
    config = SparsityConfig(pattern, None if pattern == "2:4" else 0.6)
    model = tiny_model("llama").to(GPU).train()
    optimizer = hf_sparse.SparseAdamW(
        hf_sparse.sparse_param_groups(model, config), lr=3e-3, foreach=foreach
    )
    sparsifier = hf_sparse.Sparsifier(optimizer, config, 30, method=method, interval=3)
    for step in range(30):
        ids = tiny_batches("llama", 4)[step % 4]["input_ids"].to(GPU)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
    report = hf_sparse.measure_sparsity(model, config)
    assert report.violations == 0
    assert report.sparsity == pytest.approx(config.sparsity, abs=0.02)  # rows of unequal length
    sparsifier.check()


@pytest.mark.parametrize("penalty", ["l0", "l1", "reweighted_l1"])
@pytest.mark.parametrize("scale", ["lr", "adaptive"])
def test_fused_foreach_and_single_steps_agree(penalty: str, scale: str) -> None:
    found = []
    for device, settings in (
        ("cpu", {"foreach": False}),
        ("cuda", {"foreach": False}),
        ("cuda", {"foreach": True}),
        ("cuda", {"fused": True}),
    ):
        model = tiny_model("gpt2").to(device).eval()
        config = SparsityConfig("unstructured", 0.5)
        optimizer = hf_sparse.SparseAdamW(
            hf_sparse.sparse_param_groups(model, config),
            lr=1e-3, lam=1e-2, penalty=penalty, scale=scale, **settings,
        )  # fmt: skip
        for batch in tiny_batches("gpt2", 4):
            ids = batch["input_ids"].to(device)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(model)
    for other in found[1:]:
        assert equal_zeros(found[0], other) > 0.99


def test_fp16_steps_that_the_scaler_skips_shrink_nothing() -> None:
    model = tiny_model("llama").to(GPU).train()
    config = SparsityConfig("unstructured", 0.5)
    optimizer = hf_sparse.SparseAdamW(
        hf_sparse.sparse_param_groups(model, config), lr=1e-3, lam=10.0, fused=True
    )
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60)
    ids = tiny_batches("llama")[0]["input_ids"].to(GPU)
    before = hf_sparse.measure_sparsity(model).zeros
    with torch.autocast("cuda", torch.float16):
        loss = model(input_ids=ids, labels=ids).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert hf_sparse.measure_sparsity(model).zeros == before


def test_a_teacher_follows_its_student_to_the_gpu() -> None:
    model = tiny_model("llama").to(GPU).train()
    distillation = Distillation(tiny_model("llama", seed=1), hidden=1.0).attach(model)
    ids = tiny_batches("llama")[0]["input_ids"].to(GPU)
    model(input_ids=ids, labels=ids).loss.backward()
    distillation.remove()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_perplexity_is_that_of_the_cpu() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    texts = [prose()[:8000]]
    here = hf_sparse.perplexity(model, tokenizer, texts, 32)
    assert hf_sparse.perplexity(model.to(GPU), tokenizer, texts, 32) == pytest.approx(
        here, rel=1e-4
    )


def test_the_compiler_refuses_a_gpu_model() -> None:
    pytest.importorskip("llvmlite")
    with pytest.raises(ValueError, match=r"CPU|cpu"):
        hf_sparse.compile(tiny_classifier().to(GPU))


def test_a_sparse_classifier_loads_in_half_precision(tmp_path: Path) -> None:
    model = tiny_classifier()
    config = SparsityConfig("2:4")
    prune_(model, config, "magnitude")
    hf_sparse.save_pretrained(model, tmp_path, config)
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float16, device_map={"": 0}
    )
    assert equal_zeros(model, loaded) == 1.0
