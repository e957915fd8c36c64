"""Magnitude pruning: the smallest weights go.

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
https://arxiv.org/abs/1506.02626. Score `|w|`, per layer or over all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.patterns import NM
from hf_sparse.selection import global_masks
from hf_sparse.structure import TargetLayer

SCOPES = ("layer", "global")


def prune(layers: Sequence[TargetLayer], config: SparsityConfig, *, scope: str = "layer") -> None:
    """Zero the weights of lowest magnitude.

    Args:
        layers: what to prune.
        config: pattern and sparsity.
        scope: `"layer"`: every layer gets the sparsity. `"global"`: all layers together do, each
            by its own magnitudes; groups compare by their mean square.

    Memory: one layer's scores; `"global"` keeps no scores, it reads the weights three times.

    Raises:
        ValueError: unknown scope, or `"global"` with N:M, where every group is fixed.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; wanted one of {', '.join(SCOPES)}.")
    if scope == "layer":
        for layer in layers:
            mask = config.pattern.keep(layer.weight.abs(), config.sparsity)
            layer.weight.masked_fill_(~mask, 0.0)
        return
    if isinstance(config.pattern, NM):
        raise ValueError(
            f"scope='global' has no meaning for pattern '{config.pattern}', which fixes the sparsity "
            "of every group. Use scope='layer'."
        )
    masks = global_masks(
        lambda: (layer.weight.abs() for layer in layers), config.pattern, config.sparsity
    )
    for layer, pruned in zip(layers, masks, strict=True):
        layer.weight.masked_fill_(pruned, 0.0)
