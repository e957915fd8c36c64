"""Tiny models whose weights lie on the grids of a config."""

from __future__ import annotations

from typing import Any

import torch

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.quantization import rounded
from hf_sparse.structure.grids import gridded
from hf_sparse.structure.layers import PRUNED_WITH
from tests.support.tiny_models import tiny_model

INT4 = SparsityConfig("2:4", bits=4, group_size=32, embedding_bits=8)


def quantised(config: SparsityConfig = INT4, family: str = "llama", **changes: Any) -> Any:
    """A pruned model, rounded to the nearest codes of the config, which it remembers."""
    return quantise_(tiny_model(family, **changes), config)


@torch.no_grad()
def quantise_(model: Any, config: SparsityConfig = INT4) -> Any:
    """Prune a model by magnitude, and round it to the config's grids."""
    plain = SparsityConfig(config.pattern, config.sparsity, config.targets, config.ignore)
    hf_sparse.prune_(model, plain, "magnitude")
    for layer, grid in gridded(model, config):
        layer.weight.copy_(rounded(layer.weight, grid))
    vars(model)[PRUNED_WITH] = config
    return model
