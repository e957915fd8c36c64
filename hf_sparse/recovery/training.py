"""The loop of a recovery: AdamW without decay, a warm-up and a cosine, gradients clipped to norm 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_sparse.calibration.calling import run_on
from hf_sparse.calibration.losses import NotFiniteError, fast_autocast
from hf_sparse.calibration.progress import steps
from hf_sparse.optim.keep_zeros import FrozenMask
from hf_sparse.optim.straight_through import StraightThrough
from hf_sparse.recovery.held_out import HeldOut
from hf_sparse.recovery.methods import Recovery
from hf_sparse.structure.grids import Gridded

_WARM_UP = 0.1
_CLIP = 1.0
# Looks at held-out batches in a run.
_LOOKS = 4
# Tokens that go through the model at once, if a step has as many.
_TOGETHER = 1024


def train(
    recovery: Recovery,
    trained: nn.Module,
    batches: Sequence[dict[str, Any]],
    *,
    freeze: bool,
    grids: Sequence[Gridded] = (),
    watch: HeldOut | None = None,
    describe: str = "Recovering",
) -> list[float]:
    """Train what has gradients in what `recovery.prepared` gave.

    Args:
        recovery: its settings.
        trained: the model, or the model with an adapter.
        batches: with labels.
        freeze: whether a mask keeps the zeros; an adapter keeps them by itself.
        grids: weights that lie on grids, and are trained to stay there.
        watch: looks at held-out batches from time to time, stops early, and gives the best weights
            back at the end.
        describe: the name of the progress bar.

    Returns:
        The mean loss of each step.

    Raises:
        NotFiniteError: the loss is no longer finite.
    """
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recovery.lr, weight_decay=0.0, fused=True)
    frozen = FrozenMask(optimizer, trained) if freeze else None
    on_grids = StraightThrough(grids)
    groups = _order(recovery, len(batches))
    looks = {round(len(groups) * (n + 1) / _LOOKS) for n in range(_LOOKS)}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, len(groups)))
    trained.train()
    losses: list[float] = []
    for group in steps(groups, describe):
        on_grids.round_()
        total = _backward(trained, [batches[index] for index in group])
        if not math.isfinite(total):
            raise NotFiniteError(
                f"the loss is {total} after {len(losses)} steps. Load the model again, and take a "
                f"lower learning rate than {recovery.lr}."
            )
        on_grids.restore_()
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        if watch is not None and len(losses) in looks:
            on_grids.round_()
            stop = watch.look()
            on_grids.restore_()
            if stop:
                break
    if frozen is not None:
        frozen.check()
    on_grids.round_()
    if watch is not None:
        watch.restore_()
    if frozen is not None:
        frozen.remove()
    return losses


def _backward(trained: nn.Module, batches: Sequence[dict[str, Any]]) -> float:
    """Add the gradients of the mean of the batches' losses, and return it."""
    total = 0.0
    for count, batch in _joined(batches):
        with fast_autocast(trained):
            loss = run_on(trained, batch).loss
        share = count / len(batches)
        (loss * share).backward()
        total += float(loss.detach()) * share
    return total


def _joined(batches: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Batches that go through the model together, and how many each stands for.

    Those of one shape in which each token counts are joined: the mean over their tokens is the mean of
    their losses, and the weights are read and cast only once.
    """
    groups: list[list[dict[str, Any]]] = []
    for batch in batches:
        last = groups[-1] if groups else None
        if (
            last is not None
            and _alike(last[0], batch)
            and _tokens(batch) * (len(last) + 1) <= _TOGETHER
        ):
            last.append(batch)
        else:
            groups.append([batch])
    return [
        (len(group), {name: torch.cat([batch[name] for batch in group]) for name in group[0]})
        if len(group) > 1
        else (1, group[0])
        for group in groups
    ]


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two batches have the same shapes, and labels and no padding at all their tokens."""
    if one.keys() != other.keys() or not one.keys() <= {"input_ids", "labels", "attention_mask"}:
        return False
    return (
        all(
            batch[name].shape == one["input_ids"].shape and not bool((batch[name] == hole).any())
            for batch in (one, other)
            for name, hole in (("labels", -100), ("attention_mask", 0))
            if name in batch
        )
        and one["input_ids"].shape == other["input_ids"].shape
    )


def _tokens(batch: dict[str, Any]) -> int:
    return int(batch["labels"].numel())


def _order(recovery: Recovery, count: int) -> list[list[int]]:
    """The batches of each optimizer step, in a random order in each epoch."""
    generator = torch.Generator().manual_seed(recovery.seed)
    order = [
        index
        for _ in range(recovery.epochs)
        for index in torch.randperm(count, generator=generator).tolist()
    ]
    size = recovery.accumulate
    return [order[i : i + size] for i in range(0, len(order), size)]


def _share(step: int, count: int) -> float:
    """Share of the peak rate in a step: a warm-up, then a cosine down to nothing."""
    warm = max(1, round(_WARM_UP * count))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(count - warm, 1)))
