"""Sparse training in Trainer that ends on a grid of few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.provenance.record import provenance_of
from hf_sparse.structure.grids import gridded, is_on_grid
from hf_sparse.structure.layers import promised_config, target_layers
from tests.optim.test_trainer import trainer


class Watch(TrainerCallback):
    """Notes after each step whether the weights are on the grid, and the first layer's zeros."""

    def __init__(self, config: SparsityConfig) -> None:
        self.config = config
        self.on_grid: list[bool] = []
        self.weights: list[torch.Tensor] = []

    def on_step_end(self, *arguments: Any, model: Any = None, **kwargs: Any) -> None:
        pairs = gridded(model, self.config)
        self.on_grid.append(all(is_on_grid(layer, grid) for layer, grid in pairs))
        self.weights.append(target_layers(model)[0].weight.clone())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["proximal", "movement"])
def test_the_last_phase_trains_on_the_grid(method: str, tmp_path: Path) -> None:
    config = SparsityConfig("2:4", bits=4, group_size=32, embedding_bits=8)
    watch = Watch(config)
    run = trainer(
        tmp_path,
        config,
        method=method,
        callbacks=(watch,),
        optimizer={"lr": 2e-2},
        gradient_accumulation_steps=2,
    )
    run.train()
    last = watch.on_grid.index(True)
    assert 10 <= last <= 13  # the schedule ends at 0.6 of 20 steps
    assert all(watch.on_grid[last:])
    assert all(config.pattern.violations(weight) == 0 for weight in watch.weights[last:])
    assert not torch.equal(watch.weights[last], watch.weights[-1])  # codes go on to move
    assert all(is_on_grid(layer, grid) for layer, grid in gridded(run.model, config))
    assert promised_config(run.model) == config
    assert dict(provenance_of(run.model).steps[-1].options)["bits"] == 4
    assert hf_sparse.measure_sparsity(run.model, config).violations == 0
