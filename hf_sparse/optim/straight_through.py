"""Training on a grid: forward and backward passes see rounded weights, an optimizer moves the others.

Source: the straight-through estimator, https://arxiv.org/abs/1308.3432: with `q(w)` the nearest value
of the grid, `w -= step(dL/dq)`. Scales and zero points stay those of the start, so that the codes at
the end are those that were trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.quantization import (
    Codes,
    Grid,
    OffGridError,
    codes_of,
    fitted_scales,
    lowest_steps,
    nearest_codes,
)
from hf_sparse.structure.grids import Gridded
from hf_sparse.structure.layers import TargetLayer


@dataclass(frozen=True)
class _Range:
    """The grid of one weight, as it was at the start.

    Attributes:
        layer: that holds it.
        scales, lowest: of each group, and its lowest code, `(rows, groups, 1)`.
        span: from there to the highest code.
    """

    layer: TargetLayer
    scales: Tensor
    lowest: Tensor
    span: int

    def nearest(self, weight: Tensor) -> Tensor:
        """The nearest values of the grid, `(out_features, in_features)`."""
        grouped = weight.float().reshape(*self.scales.shape[:2], -1)
        codes = torch.clamp((grouped / self.scales).round_(), self.lowest, self.lowest + self.span)
        return codes.mul_(self.scales).reshape(weight.shape)


def _codes(weight: Tensor, grid: Grid, fit: bool) -> Codes:
    """The codes of a weight; if it is not on the grid and `fit` is given, the nearest ones."""
    try:
        return codes_of(weight, grid)
    except OffGridError:
        if not fit:
            raise
        return nearest_codes(weight, fitted_scales(weight, grid), grid)


class StraightThrough:
    """Weights that lie on grids, and that an optimizer is to move.

    Args:
        layers: weights on their grids.
        fit: search scales for those that are not.

    Memory: a second copy of them.

    Raises:
        OffGridError: they are not, and `fit` is not given.
    """

    def __init__(self, layers: Sequence[Gridded], *, fit: bool = False) -> None:
        self._ranges: list[_Range] = []
        for layer, grid in layers:
            found = _codes(layer.weight, grid, fit).steps()
            steps = found.codes.reshape(*found.scales.shape, -1).float()
            lowest = lowest_steps(steps, grid)
            self._ranges.append(
                _Range(layer, found.scales[..., None], lowest[..., None], grid.span)
            )
        parameters = {id(one.layer.parameter): one.layer.parameter for one in self._ranges}
        self._moved = {key: parameter.data.clone() for key, parameter in parameters.items()}
        self._parameters = parameters

    @torch.no_grad()
    def round_(self) -> None:
        """Before a forward pass, and at the end: the model's weights become those of the grid."""
        for key, parameter in self._parameters.items():
            self._moved[key].copy_(parameter.data)
        for one in self._ranges:
            one.layer.weight.copy_(
                one.nearest(one.layer.part(self._moved[id(one.layer.parameter)]))
            )

    @torch.no_grad()
    def restore_(self) -> None:
        """After the backward pass: the model's weights become those that the optimizer moves."""
        for key, parameter in self._parameters.items():
            parameter.data.copy_(self._moved[key])
