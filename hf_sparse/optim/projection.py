"""Projection of the weights in training on an exact sparsity."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_sparse.optim.parameters import SparseParameter, sparse_groups, sparse_parameters
from hf_sparse.optim.sharding import processes_of
from hf_sparse.patterns import Pattern
from hf_sparse.selection import global_masks

Score = Callable[[SparseParameter], Tensor]


def magnitude(sparse: SparseParameter) -> Tensor:
    """|w|, the score of magnitude pruning, fp32, `(out_features, in_features)`."""
    return sparse.weight.abs().float()


def saliency(sparse: SparseParameter) -> Tensor:
    """|w| in the optimizer's metric: `|w| sqrt(sqrt(v) + eps)` under scale `adaptive`, else |w|.

    Half its square is what the prox of l0 compares: the second-order loss of removing a weight, with
    the root of Adam's second moments as curvature.
    """
    metric = sparse.metric()
    return magnitude(sparse) if metric is None else magnitude(sparse) * metric.sqrt()


def pattern_of(optimizer: Optimizer) -> Pattern:
    """The one pattern of the sparse groups.

    Raises:
        ValueError: there is no sparse group, or they differ.
    """
    patterns = {group["pattern"] for group in sparse_groups(optimizer)}
    if not patterns:
        raise ValueError(
            f"this {type(optimizer).__name__} has no param group that is to be sparse; wanted an "
            "optimizer that knows which weights are. Give the Trainer "
            "optimizer_cls_and_kwargs=hf_sparse.trainer_optimizer(config, lr=...), with "
            f"optimizer_cls={type(optimizer).__name__} for this one; or in a loop make it from "
            "hf_sparse.sparse_param_groups(model, config): SparseAdamW, or another one with "
            "hf_sparse.add_shrinkage_."
        )
    if len(patterns) != 1:
        raise ValueError(
            f"the optimizer's sparse groups have the patterns {sorted(patterns)}; wanted one. Make "
            "the groups with hf_sparse.sparse_param_groups(model, config), or in a Trainer with "
            "optimizer_cls_and_kwargs=hf_sparse.trainer_optimizer(config, lr=...)."
        )
    return Pattern.parse(patterns.pop())


@torch.no_grad()
def project_(optimizer: Optimizer, share: float, score: Score = magnitude) -> None:
    """Zero the units of lowest score in the sparse groups: exactly `share` of all of them.

    Args:
        optimizer: its sparse groups' weights change in place.
        share: fraction of the units (weights, groups; for N:M the share of groups that follow it).
        score: importance of each weight of a parameter, `>= 0`.

    Memory: the scores of one weight.

    Raises:
        ValueError: weights that are not finite.
    """
    parameters = list(sparse_parameters(optimizer))
    masks = global_masks(
        lambda: (score(sparse) for sparse in parameters),
        pattern_of(optimizer),
        share,
        processes_of(sparse.parameter for sparse in parameters),
    )
    for sparse, pruned in zip(parameters, masks, strict=True):
        sparse.weight.masked_fill_(pruned, 0.0)


def measured_sparsity(optimizer: Optimizer) -> float:
    """Fraction of zeros in the sparse groups, over all processes."""
    zeros, weights = _count(optimizer, lambda sparse: sparse.weight == 0)
    return zeros / max(weights, 1)


def count_zero_units(optimizer: Optimizer) -> tuple[int, int]:
    """Units of the sparse groups that are zero, and all of them, over all processes.

    Units are what the pattern prunes as a whole; an N:M group is zero when it follows the pattern.
    """
    pattern = pattern_of(optimizer)

    def zero(sparse: SparseParameter) -> Tensor:
        return pattern.units((sparse.weight != 0).float()) == 0

    return _count(optimizer, zero)


@torch.no_grad()
def _count(optimizer: Optimizer, mark: Callable[[SparseParameter], Tensor]) -> tuple[int, int]:
    """Marked and all units, over all processes."""
    parameters = list(sparse_parameters(optimizer))
    counts = torch.zeros(2, dtype=torch.int64)
    for sparse in parameters:
        marked = mark(sparse)
        counts += torch.tensor([int(marked.sum()), marked.numel()])
    processes_of(sparse.parameter for sparse in parameters).sum_(counts)
    return int(counts[0]), int(counts[1])
