"""Param groups: which weights of a model are shrunk, and which decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_sparse.arguments import check_kinds, check_model
from hf_sparse.configuration_sparse import SparsityConfig, check_config
from hf_sparse.patterns import Pattern
from hf_sparse.provenance.record import watch_
from hf_sparse.structure.layers import TargetLayer, by_identity, check_divides
from hf_sparse.structure.targets import Targets


def sparse_param_groups(
    model: nn.Module, config: SparsityConfig, *, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into groups for a sparse optimizer.

    Args:
        model: any model; shared weights (ALBERT's layers) are listed once.
        config: pattern and targets. The default targets leave embeddings, norms, biases, poolers and
            task heads alone.
        weight_decay: of matrices; None leaves it to the optimizer. Biases and norms do not decay.

    Returns:
        Groups of `(name, parameter)`: the targets, with `pattern` set (those stored transposed,
        GPT-2's Conv1D, apart, and the stacks of a mixture's experts), then the rest with
        `pattern=None`. Empty groups are left out.

    Raises:
        ValueError: targets that match nothing, that are frozen, or that the pattern cannot divide; some
            of the experts that one parameter holds, and not all; `uniform=True`, since all units
            compete.
    """
    check_model(model, "sparse_param_groups")
    check_kinds(sparse_param_groups, locals())
    check_config(config)
    if config.uniform:
        raise ValueError(
            "uniform=True is for prune_: in training all units compete, and blocks lose different "
            "numbers of them. Leave it out, and call hf_sparse.shrink_(model, uniform=True) at the end."
        )
    chosen = Targets.of(model, config)
    layers, pattern = chosen.layers, chosen.pattern
    if frozen := [layer.weight_name for layer in layers if not layer.parameter.requires_grad]:
        raise ValueError(
            f"{len(frozen)} of {len(layers)} targets are frozen ({frozen[0]}, ...): they would stay "
            "dense. Call requires_grad_(True) on them, or leave them out with `ignore`."
        )
    for layer in layers:
        check_divides(pattern, layer.weight_name, *layer.weight.shape)
    targets = by_identity(layers)
    for held in targets.values():
        _check_whole(held, pattern)
    # By how they are stored, which groups of weights have to know: transposed, stacked.
    sparse_ones: dict[tuple[bool, bool], list[Any]] = {}
    matrices: list[Any] = []
    vectors: list[Any] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in targets:
            target = targets[id(parameter)][0]
            stored = (target.transposed, target.stack is not None and not target.stack.below)
            stored = (False, False) if pattern.elementwise else stored
            sparse_ones.setdefault(stored, []).append((name, parameter))
        else:
            (matrices if parameter.ndim > 1 else vectors).append((name, parameter))
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    sparse = {"pattern": str(pattern), **decay}
    groups: list[dict[str, Any]] = [
        *(
            {
                "params": found,
                **sparse,
                "transposed": turned,
                **({"stacked": True} if stacked else {}),
            }
            for (turned, stacked), found in sorted(sparse_ones.items(), key=lambda item: item[0])
        ),
        {"params": matrices, "pattern": None, **decay},
        {"params": vectors, "pattern": None, "weight_decay": 0.0},
    ]
    watch_(model)
    return [group for group in groups if group["params"]]


def _check_whole(layers: Sequence[TargetLayer], pattern: Pattern) -> None:
    """Refuse a stack of which only some matrices are targets: optimizers step on whole parameters.

    Of one whose matrices lie one below the other, also groups that are not those of the whole.
    """
    stack = layers[0].stack
    if stack is not None and len(layers) != stack.number:
        raise ValueError(
            f"{len(layers)} of the {stack.number} experts of {layers[0].parameter_name} are targets, "
            "and an optimizer shrinks whole parameters. Name all of them, or leave all out."
        )
    if stack is None or not stack.below:
        return
    whole = layers[0].parameter.shape
    rows, columns = reversed(whole) if layers[0].transposed else whole
    if pattern.group_shape(rows, columns) != pattern.group_shape(*layers[0].weight.shape):
        raise ValueError(
            f"the experts of {layers[0].parameter_name} lie one below the other in one matrix, and "
            f"groups of pattern '{pattern}' would span them. Take another pattern, such as "
            "'unstructured', '2:4' or 'block:4x4', or leave them out: ignore=['experts.*']."
        )
