"""What pruning would make sparse in a dense checkpoint, and what it would leave as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from hf_sparse.checkpoint.bounds import Size, bounded
from hf_sparse.checkpoint.described import describing
from hf_sparse.checkpoint.model_classes import first_class_of, model_class_named
from hf_sparse.structure.layers import Stack, find_stacks, is_matrix, layers_of, num_parameters
from hf_sparse.upstream.transformers.models import build

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_OUTSIDE = "matrices outside the blocks, such as heads, poolers and projections"


@dataclass(frozen=True)
class LeftOut:
    """Weights that are no targets without being named, for one reason.

    Attributes:
        reason: what they are.
        weights: how many.
        names: of the parameters.
    """

    reason: str
    weights: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Candidates:
    """What the default targets are in a model.

    Attributes:
        model: the name of its class.
        blocks: how many blocks each list of them has, by its name.
        targets: the names of their weights.
        target_weights: how many weights they have.
        weights: of the whole model.
        left_out: the others, by reason.
    """

    model: str
    blocks: dict[str, int]
    targets: tuple[str, ...]
    target_weights: int
    weights: int
    left_out: tuple[LeftOut, ...]

    def __str__(self) -> str:
        share = self.target_weights / max(self.weights, 1)
        blocks = ", ".join(f"{count} in {name}" for name, count in self.blocks.items())
        lines = [
            f"pruning {self.model} would make {len(self.targets)} matrices sparse, "
            f"{self.target_weights:,} of {self.weights:,} weights ({share:.1%})",
            f"blocks: {blocks}"
            if blocks
            else "it has no repeated blocks with matrices: name targets=[...]",
        ]
        for left in self.left_out:
            more = f" and {len(left.names) - 1} more" if len(left.names) > 1 else ""
            lines.append(f"left out: {left.weights:,} in {left.reason}: {left.names[0]}{more}")
        return "\n".join(lines)


def dense_model_in(folder: Path, stored: Size) -> PreTrainedModel:
    """The model that the config.json of a dense checkpoint describes, on the meta device.

    Args:
        folder: of the checkpoint.
        stored: what it has.

    Raises:
        FormatError: the config describes no model that transformers can make.
    """
    with describing(folder / "config.json"):
        config = AutoConfig.from_pretrained(folder)
        name = (config.architectures or [""])[0]
        kind = model_class_named(name, type(config)) or first_class_of(type(config))
        if kind is None:
            raise ValueError(f"no Auto class has a model for {type(config).__name__}")
        with torch.device("meta"), bounded(stored):
            model: PreTrainedModel = build(kind, config)
    return model


def candidates_of(model: PreTrainedModel) -> Candidates:
    """The default targets of a model, which may be on the meta device."""
    stacks = find_stacks(model)
    layers = layers_of(stacks)
    own = {id(layer.parameter) for layer in layers}
    left: dict[str, list[tuple[str, int]]] = {}
    for name, parameter, reason in _others(model, stacks):
        if id(parameter) not in own:
            left.setdefault(reason, []).append((name, parameter.numel()))
    return Candidates(
        type(model).__name__,
        {stack.name: len(stack.blocks) for stack in stacks},
        tuple(layer.weight_name for layer in layers),
        sum(layer.weight.numel() for layer in layers),
        num_parameters(model),
        tuple(
            LeftOut(reason, sum(count for _, count in found), tuple(name for name, _ in found))
            for reason, found in sorted(left.items(), key=lambda item: -sum(c for _, c in item[1]))
        ),
    )


def _others(model: nn.Module, stacks: list[Stack]) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Every parameter once, with the reason for which it is no target if it is none."""
    inside = {id(m) for stack in stacks for block in stack.blocks for m in block.modules()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if id(parameter) not in seen and name not in tied:
                seen.add(id(parameter))
                yield name, parameter, _reason(module, parameter, id(module) in inside)


def _reason(module: nn.Module, parameter: nn.Parameter, inside: bool) -> str:
    if parameter.ndim < 2:
        return "vectors, such as norms and biases"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if isinstance(module, _CONVOLUTIONS):
        return "convolutions"
    if is_matrix(module) and not inside:
        return _OUTSIDE
    if not inside:
        return "other parameters outside the blocks"
    if parameter.ndim > 2:
        return "stacks of matrices in the blocks that are of no known kind"
    if is_matrix(module):
        return "routers, which choose among experts"
    return f"parameters of {type(module).__name__} in the blocks, which is no Linear"
