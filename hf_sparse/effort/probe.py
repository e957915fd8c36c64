"""What a plan will take: time from a short measurement of its own steps on this machine, and memory.

One block is pruned by the plan's method on one and on a few batches, and gets its weights back. What
grows with the data and what does not is told apart by the two times:

    seconds = batches * (passes * forward + blocks * per_batch) + blocks * fixed

with `forward` of the whole model's body, `passes` of it through all blocks (2 if the dense model is
followed), and `blocks` the target weights over those of the block. A training step is measured once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.calibration.attending import fast_attention
from hf_sparse.calibration.linalg import FastProducts
from hf_sparse.calibration.losses import loss_of
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.progress import silent
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.effort.plan import SparsifyPlan
from hf_sparse.effort.stages import PRUNE, Stage, tokens_in
from hf_sparse.provenance.record import provenance_of, remember_
from hf_sparse.pruning.methods import METHODS
from hf_sparse.pruning.oneshot import prune_
from hf_sparse.structure.layers import PRUNED_WITH, TargetLayer, layers_in, num_parameters
from hf_sparse.structure.targets import Targets

# Batches of the second pruning of the measured block.
_FEW = 3
# Forward passes that a pass of training a block takes, and a refit, where they are not measured.
_PER_EPOCH, _PER_REFIT = 1.6, 1.3
# A step of an optimizer and of masks, over the backward pass before it.
_STEP = 1.15
# Tensors of a batch's logits that training holds.
_LOGITS = 3

Batches = Sequence[Mapping[str, Any]]


def estimated(
    plan: SparsifyPlan, model: nn.Module, targets: Targets, batches: Batches
) -> SparsifyPlan:
    """The plan with the seconds and the memory of its stages.

    The model is as before afterwards. It takes about a few forward passes of a batch, and two prunings
    of one block.

    Args:
        plan: without estimates, or with those of another machine.
        model: to be made sparse.
        targets: of the plan's config.
        batches: its data.
    """
    forward = _forward_seconds(model, batches[0])
    seconds, memory = [], []
    for stage in plan.stages:
        if stage.kind == PRUNE:
            seconds.append(_of_pruning(stage, model, targets, batches, forward))
            memory.append(_memory_of_pruning(stage, model, targets, batches))
        else:
            seconds.append(_of_recovery(stage, model, batches, forward))
            memory.append(_memory_of_recovery(stage, model, targets, batches))
    return replace(plan, seconds=tuple(seconds), memory_mb=tuple(memory))


def _timed(run: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _forward_seconds(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """Of one batch through the model's body, after a pass that warms up."""
    body: Any = getattr(model, "base_model", model)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad(), FastProducts(), switched(model, training=False, use_cache=False):
        body(**inputs)
        return _timed(lambda: body(**inputs))


def _of_pruning(
    stage: Stage, model: nn.Module, targets: Targets, batches: Batches, forward: float
) -> tuple[float, ...]:
    """The seconds of each loop of a pruning."""
    options = dict(stage.options)
    passes = 2 if options.get("reconstruct") else 1
    loops = []
    if options.pop("allocation", None) == "owl":
        loops.append(stage.batches * forward * 2)
    if METHODS[stage.method].masks is not None:  # of all layers at once, by the model's loss
        loops.append(stage.batches * _step_seconds(model, batches[0]))
        walked = options.get("reconstruct", 0) * _PER_EPOCH + _PER_REFIT * bool(
            options.get("refine")
        )
        return (*loops, stage.batches * forward * (passes + walked))
    inside = _middle_block(targets)
    if targets.whole_units or not inside:
        walked = options.get("reconstruct", 0) * _PER_EPOCH + _PER_REFIT
        return (*loops, stage.batches * forward * (passes + walked))
    few = min(_FEW, len(batches))
    times = _block_seconds(
        stage.method, options, model, targets, inside, [batches[:1], batches[:few]]
    )
    slope = (times[1] - times[0]) / (few - 1) if few > 1 else times[0]
    slope = max(slope, passes * forward)
    fixed, per_batch = max(times[0] - slope, 0.0), slope - passes * forward
    blocks = _numel(targets.layers) / max(_numel(inside), 1)
    whole = stage.batches * (passes * forward + blocks * per_batch) + blocks * fixed
    return (*loops, whole)


def _middle_block(targets: Targets) -> list[TargetLayer]:
    """The targets in the block in the middle of the first stack that has some."""
    for stack in targets.stacks:
        inside = [found for block in stack.blocks if (found := layers_in(block, targets.layers))]
        if inside:
            return list(inside[len(inside) // 2])
    return []


def _block_seconds(
    method: str,
    options: Mapping[str, Any],
    model: nn.Module,
    targets: Targets,
    inside: Sequence[TargetLayer],
    data: Sequence[Batches],
) -> list[float]:
    """The seconds of pruning one block, on each of the data."""
    named = {"targets": [layer.name for layer in inside], "ignore": []}
    config = SparsityConfig.from_dict({**targets.config.to_dict(), **named})
    found = []
    for batches in data:
        with _unchanged(model, inside), silent():
            found.append(_timed(lambda: prune_(model, config, method, batches, **options)))  # noqa: B023
    return found


@contextmanager
def _unchanged(model: nn.Module, layers: Sequence[TargetLayer]) -> Iterator[None]:
    """The weights of layers, and what is known of the model, are as before at the end."""
    known, promise = provenance_of(model), vars(model).get(PRUNED_WITH)
    parameters: dict[int, nn.Parameter] = {id(layer.parameter): layer.parameter for layer in layers}
    kept: list[tuple[nn.Parameter, Tensor]] = [(p, p.data.clone()) for p in parameters.values()]
    try:
        yield
    finally:
        for parameter, weight in kept:
            parameter.data.copy_(weight)
        remember_(model, known)
        if promise is None:
            vars(model).pop(PRUNED_WITH, None)
        else:
            vars(model)[PRUNED_WITH] = promise


def _of_recovery(
    stage: Stage, model: nn.Module, batches: Batches, forward: float
) -> tuple[float, ...]:
    """The seconds of training, with its held-out batches before and after."""
    taught = forward if stage.options.get("distilled") else 0.0
    step = _STEP * _step_seconds(model, batches[0]) + taught
    epochs = stage.options.get("epochs", 1)
    return (epochs * stage.batches * step + 2 * stage.held_out * forward * 1.3,)


def _step_seconds(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """Of one forward and backward pass, after one that warms up."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]

    def step() -> None:
        torch.autograd.grad(loss_of(model, batch), parameters, allow_unused=True)

    with switched(model, trained=parameters), fast_attention(model, [batch]):
        step()
        return _timed(step)


def _memory_of_pruning(stage: Stage, model: Any, targets: Targets, batches: Batches) -> float:
    """MB beside the model: hidden states, Gram matrices, and what trains a block."""
    size = max((p.element_size() for p in model.parameters()), default=4)
    hidden = getattr(model.config.get_text_config(), "hidden_size", 0) or 0
    follows = 2 if stage.options.get("reconstruct") else 1
    states = tokens_in(batches[: stage.batches]) * hidden * size * follows
    widest = max(layer.weight.shape[1] for layer in targets.layers)
    inside = _middle_block(targets)
    trained = 20 * _numel(inside) if stage.options.get("reconstruct") else 0
    gradients = 4 * _numel(targets.layers) if METHODS[stage.method].trains else 0
    return float(states + 4 * 8 * widest**2 + trained + gradients) / 1e6


def _memory_of_recovery(stage: Stage, model: Any, targets: Targets, batches: Batches) -> float:
    """MB beside the model: gradients and moments, or an adapter; a batch's logits; a teacher."""
    weights = num_parameters(model)
    trained = 12 * weights
    if stage.method != "finetune":  # matrices of rank r, their gradients and moments
        rank = stage.options.get("r") or 16
        trained = sum(16 * rank * sum(layer.weight.shape) for layer in targets.layers)
        trained += 4 * _numel(_middle_block(targets))
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0) or 0
    logits = max(tokens_in([batch]) for batch in batches) * vocabulary * 4 * _LOGITS
    before = 4 * weights  # to put back if it does not help
    taught = 4 * weights if stage.options.get("distilled") else 0
    return float(trained + logits + before + taught) / 1e6


def _numel(layers: Sequence[TargetLayer]) -> int:
    return sum(layer.weight.numel() for layer in layers)
