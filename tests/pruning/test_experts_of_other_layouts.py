"""Experts below each other in 2-D parameters (DBRX), and those that all tokens go to (Inkling)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparsityConfig, drop_experts_, prune_
from hf_sparse.calibration.input_statistics import Grams
from hf_sparse.calibration.recording import token_masks
from hf_sparse.structure.layers import block_layers
from tests.support.any_models import build, tiny_config

torch.set_num_threads(1)
EXPERTS = 4


def made(model_type: str) -> Any:
    config = tiny_config(model_type)
    return build(config, AutoModelForCausalLM._model_mapping[type(config)])


def padded(number: int = 3) -> list[dict[str, Tensor]]:
    """Batches of which the last four tokens of a text do not count."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 200, (2, 24), generator=generator) for _ in range(number)]
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, -4:] = 0
    return [{"input_ids": own, "attention_mask": mask} for own in ids]


@torch.no_grad()
def seen_by(model: Any, part: str, around: Any) -> tuple[dict[str, Any], Tensor, tuple[Any, ...]]:
    """What the layers of a part saw of a batch, by name; what entered `around`, and its masks."""
    [batch] = padded(1)
    given: list[Any] = []
    hook = around.register_forward_pre_hook(
        lambda module, args, kwargs: given.append((*args, *kwargs.values())), with_kwargs=True
    )
    statistics = Grams()
    layers = [layer for layer in block_layers(model) if part in layer.name]
    statistics.on_batch(token_masks(batch))
    with statistics.collecting(layers):
        model(**batch)
        statistics.end_call()
    hook.remove()
    found = {layer.name: seen for seen in statistics.groups() for layer in seen.layers}
    return found, batch["attention_mask"].flatten().bool(), given[0]


def close(seen: Any, inputs: Tensor) -> None:
    assert seen.tokens == len(inputs)
    torch.testing.assert_close(seen.statistic, inputs.T @ inputs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_expert_of_dbrx_sees_its_own_tokens_with_gate_and_up_together() -> None:
    model = made("dbrx")
    experts = model.transformer.blocks[0].ffn.experts
    path = "transformer.blocks.0.ffn.experts.mlp"
    seen, counts, (hidden, chosen, _) = seen_by(model, path, experts)
    assert len(seen) == 3 * EXPERTS
    hidden = hidden.reshape(-1, hidden.shape[-1])
    for expert in range(EXPERTS):
        own = hidden[(chosen == expert).any(dim=1) & counts]
        rows = slice(64 * expert, 64 * (expert + 1))
        gate, up = own @ experts.mlp.w1[rows].T, own @ experts.mlp.v1[rows].T
        first, last = seen[f"{path}.w1.{expert}"], seen[f"{path}.w2.{expert}"]
        assert [layer.attribute for layer in first.layers] == ["w1", "v1"]
        close(first, own)
        close(last, functional.silu(gate) * up)


@torch.no_grad()
def test_shared_experts_of_inkling_see_all_tokens_and_the_last_product_their_weights() -> None:
    model = made("inkling_text")
    shared = model.model.layers[0].mlp.shared_experts
    path = "model.layers.0.mlp.shared_experts"
    seen, counts, (hidden, weights) = seen_by(model, path, shared)
    hidden = hidden.reshape(-1, hidden.shape[-1])[counts]
    weights = weights.reshape(-1, weights.shape[-1])[counts]
    assert seen[f"{path}.gate_proj.0"] is seen[f"{path}.up_proj.1"]
    close(seen[f"{path}.gate_proj.0"], hidden)
    for expert in range(len(shared.down_proj)):
        gate = functional.silu(hidden @ shared.gate_proj[expert].T)
        inner = gate * (hidden @ shared.up_proj[expert].T)
        close(seen[f"{path}.down_proj.{expert}"], inner * weights[:, expert, None])


@pytest.mark.few(2)
@pytest.mark.parametrize("model_type", ["dbrx", "inkling_text"])
@pytest.mark.parametrize(
    ("pattern", "method"),
    [("2:4", "sparsegpt"), ("block:4x4", "magnitude"), ("row", "wanda"), ("column", "magnitude")],
)
def test_pruned_experts_come_back(
    model_type: str, pattern: str, method: str, tmp_path: Path
) -> None:
    model = made(model_type)
    data = None if method == "magnitude" else padded()
    named = {} if pattern in ("2:4", "block:4x4") else {"targets": "*experts.*"}
    report = prune_(model, SparsityConfig(pattern, 0.5, **named), method, data)
    assert report.sparsity == 0.5
    assert report.violations == report.partial == 0
    assert any(".w2.3" in count.name or "shared" in count.name for count in report.tensors)
    hf_sparse.save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert hf_sparse.inspect_checkpoint(tmp_path).report.zeros == report.zeros


@pytest.mark.parametrize("model_type", ["dbrx", "inkling_text"])
@pytest.mark.parametrize("method", ["alps", "sparsellm", "proxsparse", "taylor"])
@pytest.mark.slow
def test_every_method_prunes_them(model_type: str, method: str) -> None:
    report = prune_(made(model_type), SparsityConfig("2:4"), method, padded())
    assert (report.sparsity, report.violations) == (0.5, 0)


def test_dbrx_is_streamed(tmp_path: Path) -> None:
    model = made("dbrx")
    model.save_pretrained(tmp_path / "dense")
    config = SparsityConfig("2:4")
    streamed = hf_sparse.prune_checkpoint(
        tmp_path / "dense", tmp_path / "sparse", config, "wanda", padded()
    )
    assert streamed.zeros == prune_(model, config, "wanda", padded()).zeros


def test_what_dbrx_cannot_do_is_refused() -> None:
    model = made("dbrx")
    with pytest.raises(ValueError, match="one below the other in 2-D parameters"):
        drop_experts_(model, 1, padded())
    with pytest.raises(ValueError, match="no experts were found"):
        prune_(model, SparsityConfig("expert", 0.25), "magnitude")
    with pytest.raises(ValueError, match="codes are stored for a matrix or for stacked ones"):
        hf_sparse.quantize_(model, bits=8, method="nearest")
    hf_sparse.sparse_param_groups(model, SparsityConfig("2:4"))
    with pytest.raises(ValueError, match="groups of pattern 'column' would span them"):
        hf_sparse.sparse_param_groups(model, SparsityConfig("column", 0.5, targets="experts.*"))


@pytest.mark.slow
def test_dbrx_trains_with_zeros_of_a_pattern() -> None:
    model = made("dbrx")
    groups = hf_sparse.sparse_param_groups(model, SparsityConfig("2:4"))
    optimizer = hf_sparse.SparseAdamW(groups, lr=1e-2, lam=0.5)
    for batch in padded():
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(bool((layer.weight == 0).any()) for layer in block_layers(model) if layer.stack)
