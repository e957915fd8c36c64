"""How many bits each weight takes that was rounded to a grid, and how far it is from what it was."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from hf_sparse.patterns import NM
from hf_sparse.pruning.problem import Notes
from hf_sparse.quantization import Grid
from hf_sparse.structure.grids import (
    Gridded,
    gridded,
)
from hf_sparse.structure.targets import Targets

_SCALE_BITS = 16


@dataclass(frozen=True)
class TensorBits:
    """One weight `(out_features, in_features)` of few bits.

    Attributes:
        name, shape: of the weight.
        grid: such as `int4, groups of 32`.
        error: of the layer's outputs on the calibration data, `||X (W - Q)ᵀ||² / ||X Wᵀ||²`; without
            data of the weight, `|W - Q|² / |W|²`.
        zeros: weights of code 0.
        bits: a weight: those of codes and scales, and the least that tells where zeros are, if that
            is less than to write their codes.
    """

    name: str
    shape: tuple[int, int]
    grid: str
    error: float
    zeros: int
    bits: float

    @property
    def numel(self) -> int:
        """Weights in the tensor."""
        return self.shape[0] * self.shape[1]


def tensors_of(layers: Iterable[Gridded], targets: Targets, notes: Notes) -> tuple[TensorBits, ...]:
    """What is known of weights after they were rounded."""
    nm = targets.pattern if isinstance(targets.pattern, NM) else None
    own = {(id(layer.parameter), layer.expert) for layer in targets.layers}
    found = []
    for layer, grid in layers:
        rows, columns = layer.weight.shape
        zeros = int((layer.weight == 0).sum())
        is_target = (id(layer.parameter), layer.expert) in own
        bits = bits_a_weight(layer.weight, grid, nm if is_target else None)
        error = notes.errors.get(layer.name, 0.0)
        found.append(TensorBits(layer.weight_name, (rows, columns), str(grid), error, zeros, bits))
    return tuple(found)


def bits_a_weight(weight: Tensor, grid: Grid, pattern: NM | None) -> float:
    """The bits of codes, scales and the places of zeros, for each weight `(out_features, in_features)`.

    Zeros are told by their codes, by the entropy of their places, or by those in groups of N:M,
    whichever is least.
    """
    columns = weight.shape[1]
    zero_point = 0 if grid.symmetric else grid.bits
    scales = (_SCALE_BITS + zero_point) / grid.columns_per_scale(columns)
    share = float((weight == 0).float().mean()) if weight.numel() else 0.0
    entropy = -sum(p * math.log2(p) for p in (share, 1 - share) if p)
    choices = [float(grid.bits), (1 - share) * grid.bits + entropy]
    if pattern is not None:
        places = math.log2(math.comb(pattern.m, pattern.n)) / pattern.m
        choices.append(pattern.n / pattern.m * grid.bits + places)
    return min(choices) + scales


def mean_bits(tensors: Iterable[TensorBits]) -> float:
    """The bits a weight of several tensors together."""
    listed = list(tensors)
    return sum(one.bits * one.numel for one in listed) / max(sum(one.numel for one in listed), 1)


def bits_notes(model: nn.Module, targets: Targets) -> tuple[str, ...]:
    """What a report tells of the bits of a model that was pruned to few of them."""
    layers = gridded(model, targets)
    if not layers:
        return ()
    tensors = tensors_of(layers, targets, Notes())
    grids = " and ".join(dict.fromkeys(one.grid for one in tensors))
    return (
        f"{len(tensors)} weights were rounded to {grids}: {mean_bits(tensors):.3f} bits a weight, "
        "scales and places of zeros included.",
    )
