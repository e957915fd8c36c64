"""Pattern `expert`: whole experts of a mixture become zero, those that it uses least.

The scores, `reap`, `frequency` and `magnitude`, and their sources stand in
`hf_sparse.calibration.expert_scores`; `hf_sparse.drop_experts_` chooses by the same. Experts that are
zero already go first.

A router has no zeros that would say so: it goes on sending tokens to experts that are zero, and these
tokens get nothing from them. `hf_sparse.shrink_` removes the experts with their rows of the router;
their tokens go to experts that stay then, as `drop_experts_` would have it. The report tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.calibration.expert_scores import kept_in_block, kept_over_all, scores_of
from hf_sparse.pruning.task import Task
from hf_sparse.structure.layers import TargetLayer
from hf_sparse.structure.mixtures import Mixtures
from hf_sparse.structure.targets import Targets

Masks = Iterator[tuple[TargetLayer, Tensor]]
SUMMARIES = {
    "reap": "experts of least router's weight x norm of the output",
    "frequency": "experts that get the fewest tokens",
    "magnitude": "experts of the smallest weights",
}


def reap(task: Task, *, scope: str = "layer") -> Masks:
    """Choose experts by what they add to their tokens on average: see `_masks`."""
    return _masks(task, "reap", scope)


def frequency(task: Task, *, scope: str = "layer") -> Masks:
    """Choose experts by how many tokens they get: see `_masks`."""
    return _masks(task, "frequency", scope)


def magnitude(task: Task, *, scope: str = "layer") -> Masks:
    """Choose experts by the norm of their weights, without data: see `_masks`."""
    return _masks(task, "magnitude", scope)


def _masks(task: Task, by: str, scope: str) -> Masks:
    """Choose the experts that stay.

    Args:
        task: what to prune.
        by: the score.
        scope: `"layer"`: as many go of each block. `"global"`: those of all blocks compete, by scores
            as multiples of their block's mean; each block keeps as many as a token is given.

    Yields:
        A matrix of an expert, and the boolean mask of the weights to keep.
    """
    mixtures: Mixtures = Mixtures.of(task.model)  # type: ignore[arg-type]
    scores, _ = scores_of(mixtures, task.batches, by, task.accelerator)
    for mixture, own in zip(mixtures.mixtures, scores, strict=True):
        own[mixture.zero] = -1.0
    left = numbers_left(task.config.sparsity, mixtures, scope)
    if scope == "layer":
        kept = [kept_in_block(own, left, mixtures.routing.groups) for own in scores]
    else:
        total = mixtures.number * len(mixtures.mixtures)
        kept = kept_over_all(scores, total - left, mixtures.routing.per_token)
    staying = {
        id(mixture.stack.module): set(own)
        for mixture, own in zip(mixtures.mixtures, kept, strict=True)
    }
    for layer in task.layers:
        stays = layer.expert in staying[id(layer.module)]
        yield layer, torch.full_like(layer.weight, stays, dtype=torch.bool)


def numbers_left(sparsity: float, mixtures: Mixtures, scope: str) -> int:
    """How many experts a sparsity leaves: of each block, or of all of them.

    Raises:
        ValueError: none goes, or too few are left.
    """
    blocks = 1 if scope == "layer" else len(mixtures.mixtures)
    total, routing = mixtures.number * blocks, mixtures.routing
    gone = round(sparsity * total)
    where = "of a block" if scope == "layer" else "of all blocks"
    if sparsity and not gone:
        raise ValueError(
            f"sparsity={sparsity:g} is no expert of the {total} {where}; wanted 0, or at least "
            f"{1 / total:.4g}."
        )
    if scope == "layer":
        if gone:
            mixtures.check(total - gone)
        return total - gone
    if routing.groups > 1:
        raise ValueError(
            f"scope='global' takes different numbers of experts from blocks, and the routers of this "
            f"{type(mixtures.model).__name__} choose among {routing.groups} groups of equal size. Use "
            "scope='layer'."
        )
    if total - gone < routing.per_token * blocks:
        raise ValueError(
            f"sparsity={sparsity:g} leaves {total - gone} of {total} experts in {blocks} blocks; each "
            f"token is given {routing.per_token} of them in every block. Wanted at most "
            f"{1 - routing.per_token / mixtures.number:.4g}."
        )
    return total - gone


def check_experts(model: nn.Module, targets: Targets, scope: str) -> None:
    """Refuse what cannot be pruned by whole experts, before any work.

    Raises:
        ValueError: the model is no mixture whose experts can go, the config names some of their
            matrices and not all, or the sparsity leaves too few.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"the model is a {type(model).__name__}; pattern 'expert' wants a model of transformers, "
            "whose config tells how many experts a token is given."
        )
    mixtures = Mixtures.of(model)
    chosen = {(id(layer.module), layer.attribute, layer.expert) for layer in targets.layers}
    every = {
        (id(mixture.stack.module), name, number)
        for mixture in mixtures.mixtures
        for name in mixture.stack.parameters
        for number in range(mixtures.number)
    }
    if chosen != every:
        raise ValueError(
            "pattern 'expert' means whole experts, and targets or ignore name "
            f"{len(chosen & every)} of their {len(every)} matrices"
            f"{' and others' if chosen - every else ''}. Leave targets and ignore out."
        )
    numbers_left(targets.config.sparsity, mixtures, scope)


def clear_biases_(layers: Iterable[TargetLayer]) -> None:
    """Set the biases of experts to zero whose matrices are."""
    for layer in layers:
        bias: Any = layer.bias
        if bias is not None and not layer.weight.any():
            bias.data.zero_()


def notes_on_experts(targets: Targets) -> tuple[str, ...]:
    """What a report tells of zero experts."""
    zero = {(id(layer.module), layer.expert) for layer in targets.layers if not layer.weight.any()}
    every = {(id(layer.module), layer.expert) for layer in targets.layers}
    if not zero:
        return ()
    return (
        f"{len(zero)} of {len(every)} experts are zero. Routers still send tokens to them, which get "
        "nothing there: call hf_sparse.shrink_, which removes them, so that these tokens go to other "
        "experts, before the model is measured, trained or used.",
    )
