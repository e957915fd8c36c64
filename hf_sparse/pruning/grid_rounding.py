"""Rounding a model's weights to the grids of a config: checks before any work, and embeddings."""

from __future__ import annotations

import torch
from torch import nn

from hf_sparse.arguments import check_finite, check_has_value
from hf_sparse.pruning.few_bits import round_nearest_
from hf_sparse.pruning.problem import Notes
from hf_sparse.structure.grids import (
    Gridded,
    check_not_on_another,
    check_whole_weights,
    gridded,
)
from hf_sparse.structure.layers import TargetLayer
from hf_sparse.structure.targets import Targets
from hf_sparse.structure.weights import check_matrices


def check_can_round(model: nn.Module, targets: Targets) -> list[Gridded]:
    """Refuse weights that cannot be rounded to the grids of a config, before any work.

    Args:
        model: any model.
        targets: of the config.

    Returns:
        The weights, and their grids.

    Raises:
        ValueError: weights that are no matrices of floats, have no values here, are not finite, are
            cut into shards, or lie on another grid; groups that do not divide their inputs.
    """
    layers = gridded(model, targets)
    if not layers:
        return []
    for layer, _ in layers:
        check_has_value(layer.weight_name, layer.parameter, "quantize_", "")
    check_whole_weights(layers)
    check_matrices([layer for layer, _ in layers])
    for layer, _ in layers:
        check_finite(layer.weight_name, layer.weight)
        _check_room(layer)
    check_not_on_another(model, targets.config)
    return layers


def _check_room(layer: TargetLayer) -> None:
    """Refuse weights that a step further are infinite: scales are rounded up."""
    weight = layer.weight
    largest = max(map(abs, map(float, weight.aminmax()))) if weight.numel() else 0.0
    most = torch.finfo(weight.dtype).max
    if largest > 0.9 * most:
        raise ValueError(
            f"{layer.weight_name} has a weight of {largest:g}, too large to be rounded in "
            f"{weight.dtype}, which ends at {most:g}. Use a type with more room, or leave the layer "
            "out: SparsityConfig(..., ignore=[...])."
        )


@torch.no_grad()
def round_embeddings_(model: nn.Module, targets: Targets, notes: Notes | None = None) -> None:
    """Round what a config puts on a grid beside its targets: embeddings, to the nearest codes."""
    own = {id(layer.parameter) for layer in targets.layers}
    others = targets.config.bits is None
    round_nearest_(
        [
            (layer, grid)
            for layer, grid in gridded(model, targets)
            if others or id(layer.parameter) not in own
        ],
        notes,
    )
