"""Tiny models that are pruned already, and where their zeros are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.optim.zeros import sparse_layers
from hf_sparse.runtime.model.families import COMPILED
from tests.support.tiny_models import tiny_batches, tiny_model


def sparse_model(family: str = "llama", pattern: str = "2:4", **changes: Any) -> Any:
    model = tiny_model(family, **changes)
    sparsity = None if ":" in pattern else 0.6
    hf_sparse.prune_(model, SparsityConfig(pattern, sparsity), "magnitude")
    return model


def pruned_and_loaded(folder: Path, config: SparsityConfig, method: str) -> Any:
    """A tiny Llama that was pruned on data, saved to a folder and loaded from it."""
    model = tiny_model("llama")
    hf_sparse.prune_(model, config, method, tiny_batches("llama"))
    hf_sparse.save_pretrained(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def places(model: Any) -> dict[str, Tensor]:
    """Where the weights of the blocks are zero."""
    return {layer.weight_name: layer.parameter == 0 for layer in sparse_layers(model)}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def random_model(config: PreTrainedConfig, sparsity: float = 0.6) -> PreTrainedModel:
    """A pruned model whose norms, biases and products all matter, for the compiler."""
    torch.manual_seed(0)
    causal = COMPILED[config.model_type].causal
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    model: PreTrainedModel = auto.from_config(config)
    model.eval()
    for parameter in model.parameters():
        # Norms and biases that matter, matrices whose products are not all near zero.
        with torch.no_grad():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(
                0.1 * torch.randn_like(parameter)
            )
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", sparsity), "magnitude")
    return model


def inputs(batch: int, tokens: int, left: int = 0, right: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, with so much padding on either side of the first sequence."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(3, 256, (batch, tokens), generator=generator)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, :left] = 0
    mask[0, tokens - right :] = 0
    return {"input_ids": ids, "attention_mask": mask}
