"""LongCat Flash, whose routers also send tokens to experts that give back what they get."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LongcatFlashConfig

import hf_sparse
from hf_sparse import SparsityConfig, drop_experts_, prune_
from hf_sparse.structure.layers import target_layers

EXPERTS, GIVING_BACK = 4, 2


def longcat() -> Any:
    config = LongcatFlashConfig(
        **{"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "ffn_hidden_size": 48},
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
        **{"head_dim": 8, "v_head_dim": 8, "moe_topk": 2, "n_routed_experts": EXPERTS},
        **{"zero_expert_num": GIVING_BACK, "expert_ffn_hidden_size": 24, "vocab_size": 128},
        **{"routed_scaling_factor": 1.0, "max_position_embeddings": 64},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name or "classifier" in name:
                parameter.normal_(0, 0.3)
    return model


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 128, (2, 24), generator=generator) for _ in range(3)]


def test_the_matrices_of_its_experts_are_targets() -> None:
    model = longcat()
    names = [layer.name for layer in target_layers(model) if ".experts." in layer.name]
    path = "model.layers.0.mlp.experts"
    assert names == [
        f"{path}.{name}.{expert}"
        for name in ("gate_up_proj", "down_proj")
        for expert in range(EXPERTS)
    ]


@pytest.mark.few(1)
@torch.no_grad()
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_pruned_stored_and_loaded(method: str, tmp_path: Path) -> None:
    model, data = longcat(), batches()
    unused = model.model.layers[0].mlp.experts.gate_up_proj[EXPERTS:].clone()
    report = prune_(model, SparsityConfig("2:4"), method, None if method == "magnitude" else data)
    assert report.violations == 0
    assert report.sparsity == 0.5
    experts = model.model.layers[0].mlp.experts
    assert torch.equal(experts.gate_up_proj[EXPERTS:], unused)  # of no expert that multiplies
    hf_sparse.save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(data[0]).logits, model(data[0]).logits)


@torch.no_grad()
def test_wanda_sees_the_tokens_that_an_expert_is_sent() -> None:
    model, data = longcat(), batches()
    alone, config = copy.deepcopy(model), SparsityConfig("2:4", targets="experts.*")
    sums = [torch.zeros(32) for _ in range(EXPERTS)]
    experts = model.model.layers[0].mlp.experts

    def look(module: Any, args: Any) -> None:
        hidden, chosen = args[:2]
        for expert in range(EXPERTS):
            sums[expert] += hidden[(chosen == expert).any(dim=1)].square().sum(dim=0)

    hook = experts.register_forward_pre_hook(look)
    for batch in data:
        model(batch)
    hook.remove()
    prune_(alone, config, "wanda", data)
    for expert in range(EXPERTS):
        weight = experts.gate_up_proj[expert]
        groups = (weight.abs() * sums[expert].sqrt()).view(-1, 4)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter(1, groups.topk(2).indices, True)
        found = alone.model.layers[0].mlp.experts.gate_up_proj[expert]
        assert torch.equal(found != 0, kept.view_as(weight))


def test_its_experts_cannot_go_whole() -> None:
    model = longcat()
    with pytest.raises(ValueError, match=r"not known which part of .*belongs to which expert"):
        drop_experts_(model, 1, batches())
    with pytest.raises(ValueError, match=r"not known which part of .*belongs to which expert"):
        prune_(model, SparsityConfig("expert", 0.25), "magnitude")
