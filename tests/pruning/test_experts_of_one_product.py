"""Experts whose products are modules of their own (JetMoE): targets on their own tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import FormatError, SparsityConfig
from hf_sparse.calibration.input_statistics import Norms
from hf_sparse.checkpoint.candidates import candidates_of
from hf_sparse.structure.layers import block_layers
from hf_sparse.structure.orientation import is_transposed
from tests.checkpoint.test_lying_configs import change
from tests.support.any_models import build, tiny_config

torch.set_num_threads(1)


def made() -> Any:
    config = tiny_config("jetmoe")
    return build(config, AutoModelForCausalLM._model_mapping[type(config)])


def batches(number: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (4, 16)
    return [{"input_ids": torch.randint(4, 200, shape, generator=generator)} for _ in range(number)]


def test_nearly_all_weights_of_the_blocks_are_targets() -> None:
    model = made()
    layers = block_layers(model)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    assert sum(layer.weight.numel() for layer in layers) >= 0.98 * matrices
    assert not any("router" in layer.name for layer in layers)
    assert all(is_transposed(layer.module, layer.attribute) == layer.transposed for layer in layers)
    reasons = [left.reason for left in candidates_of(model).left_out]
    assert not any("no known kind" in reason for reason in reasons)


@torch.no_grad()
def test_an_expert_is_shown_the_tokens_that_its_router_gives_it() -> None:
    model, [batch] = made(), batches(1)
    block = model.model.layers[0]
    experts = [layer for layer in block_layers(model) if layer.module is block.mlp.input_linear]
    given: list[Any] = []
    hook = block.mlp.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    statistics = Norms()
    with statistics.collecting(experts):
        model(**batch)
        statistics.end_call()
    hook.remove()
    hidden = given[0].reshape(-1, given[0].shape[-1])
    router = block.mlp.router
    chosen = router.layer(hidden).topk(router.top_k, dim=1).indices
    for seen in statistics.groups():
        [layer] = seen.layers
        own = hidden[(chosen == layer.expert).any(dim=1)]
        assert seen.tokens == len(own)
        torch.testing.assert_close(seen.statistic, own.double().norm(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("pattern", "method"), [("2:4", "sparsegpt"), ("unstructured", "magnitude")]
)
def test_pruned_experts_come_back(pattern: str, method: str, tmp_path: Path) -> None:
    model = made()
    data = None if method == "magnitude" else batches()
    report = hf_sparse.prune_(model, SparsityConfig(pattern, 0.5), method, data)
    hf_sparse.save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert hf_sparse.inspect_checkpoint(tmp_path).report.zeros == report.zeros
    change(tmp_path, num_experts_per_tok=5)
    with pytest.raises(FormatError, match=r"each token to 5 experts.*there are 4"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_they_are_streamed(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path / "dense")
    config = SparsityConfig("2:4")
    streamed = hf_sparse.prune_checkpoint(
        tmp_path / "dense", tmp_path / "sparse", config, "wanda", batches()
    )
    assert streamed.zeros == hf_sparse.prune_(model, config, "wanda", batches()).zeros


def test_padding_that_cannot_be_told_is_refused() -> None:
    model, [batch] = made(), batches(1)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match="batches without padding"):
        hf_sparse.prune_(model, SparsityConfig("2:4"), "wanda", [{**batch, "attention_mask": mask}])
