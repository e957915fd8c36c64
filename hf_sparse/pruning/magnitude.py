"""Magnitude pruning: the smallest weights go.

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
https://arxiv.org/abs/1506.02626. Score `|w|`, per layer or over all layers together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from hf_sparse.pruning.task import Task
from hf_sparse.selection import global_masks
from hf_sparse.structure.layers import TargetLayer


def masks(task: Task, *, scope: str = "layer") -> Iterator[tuple[TargetLayer, Tensor]]:
    """Choose the weights of highest magnitude.

    Args:
        task: what to prune; no data is needed.
        scope: `"layer"`: every layer gets its sparsity. `"global"`: all layers together do, each
            by its own magnitudes; groups compare by their mean square.

    Yields:
        A layer, and the boolean mask of the weights to keep.

    Memory: one layer's scores; `"global"` keeps no scores, it reads the weights three times.
    """
    yield from by_scope(task, lambda layer: layer.weight.abs(), scope)


def by_scope(
    task: Task, score: Callable[[TargetLayer], Tensor], scope: str
) -> Iterator[tuple[TargetLayer, Tensor]]:
    """Choose the weights of highest score, in each layer or in all together.

    Args:
        task: what to prune.
        score: gives the scores of a layer's weights, `(out_features, in_features)`; called anew
            whenever they are needed.
        scope: see `masks`.

    Yields: see `masks`.
    """
    pattern, layers = task.config.pattern, task.layers
    if scope == "layer":
        for layer in layers:
            yield layer, pattern.keep(score(layer), task.sparsities[layer.name])
        return
    pruned = global_masks(lambda: (score(layer) for layer in layers), pattern, task.config.sparsity)
    for layer, mask in zip(layers, pruned, strict=True):
        yield layer, ~mask
