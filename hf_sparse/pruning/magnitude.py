"""Magnitude pruning: the smallest weights go.

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
https://arxiv.org/abs/1506.02626. Score `|w|`, per layer or over all layers together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.patterns import NM, GroupPattern
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
    _prune_globally(layers, config)


def _prune_globally(layers: Sequence[TargetLayer], config: SparsityConfig) -> None:
    def unit_scores(layer: TargetLayer) -> Tensor:
        magnitudes = layer.weight.abs().float()
        if not isinstance(config.pattern, GroupPattern):
            return magnitudes
        height, width = config.pattern.group_shape(*magnitudes.shape)
        return config.pattern.unit_scores(magnitudes) / (height * width)

    units = sum(unit_scores(layer).numel() for layer in layers)
    count = round(config.sparsity * units)
    if count == 0:
        return
    threshold, ties = kth_smallest(lambda: (unit_scores(layer) for layer in layers), count)
    for layer in layers:
        scores = unit_scores(layer)
        tied = (scores == threshold).reshape(-1)
        pruned_ties = tied & (tied.cumsum(0) <= ties)
        ties -= int(pruned_ties.sum())
        pruned = (scores < threshold) | pruned_ties.view(scores.shape)
        if isinstance(config.pattern, GroupPattern):
            pruned = config.pattern.spread(pruned, layer.weight.shape)
        layer.weight.masked_fill_(pruned, 0.0)


def kth_smallest(parts: Callable[[], Iterator[Tensor]], count: int) -> tuple[float, int]:
    """The `count`-th smallest of many tensors' values, without gathering them.

    Non-negative floats have the order of their bit patterns, so two histograms of 16 bits each
    find the value exactly.

    Args:
        parts: gives the tensors anew at each call, fp32, non-negative and finite.
        count: from 1 to the number of values.

    Returns:
        The value, and how many of the values equal to it are among the `count` smallest.
    """
    high, below = _bin_of(parts, count, lambda bits: bits >> 16)
    low, ties = _bin_of(parts, count - below, lambda bits: bits[bits >> 16 == high] & 0xFFFF)
    threshold = torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32)
    return float(threshold), count - below - ties


def _bin_of(
    parts: Callable[[], Iterator[Tensor]], count: int, key: Callable[[Tensor], Tensor]
) -> tuple[int, int]:
    """The bin in which the `count`-th smallest key falls, and how many keys are below it."""
    histogram = torch.zeros(1 << 16, dtype=torch.int64)
    for part in parts():
        keys = key(part.contiguous().view(torch.int32).reshape(-1))
        histogram += torch.bincount(keys, minlength=1 << 16).cpu()
    upto = histogram.cumsum(0)
    found = int(torch.searchsorted(upto, count))
    return found, int(upto[found] - histogram[found])
