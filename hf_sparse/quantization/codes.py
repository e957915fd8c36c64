"""The codes and scales of a weight that lies on a grid, found from its values alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.quantization.grid import Grid

# Weights that are looked at together: bounds the working memory to some 20 bytes for each of them.
_CHUNK = 2**22
# Weights of a group that a candidate scale must fit before all of them are tried.
_SAMPLE = 8


@dataclass(frozen=True)
class Codes:
    """A weight on a grid: `scales * codes`, each scale for the columns of its group.

    Attributes:
        codes: `(out_features, in_features)`; int8 of symmetric grids, otherwise int16.
        scales: `(out_features, groups)`, float32, each of them a bfloat16. Of grids that have signs a
            group has a negative scale if its largest code would be above the grid's; else positive.
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def of_steps(cls, steps: Tensor, scales: Tensor, grid: Grid) -> Codes:
        """The codes of weights that are so many steps of positive scales away from 0.

        Args:
            steps: `(out_features, in_features)`, whole numbers. Of grids that have signs those of a
                group lie in the grid's range, or their opposites do.
            scales: `(out_features, groups)`, positive.
        """
        codes = steps.to(torch.int8 if grid.symmetric else torch.int16)
        if grid.has_signs and codes.numel():
            grouped = codes.reshape(*scales.shape, -1)
            turned = grouped.amax(-1) > grid.highest_code
            codes = torch.where(turned[..., None], -grouped, grouped).reshape(codes.shape)
            scales = torch.where(turned, -scales, scales)
        return cls(codes, scales)

    def steps(self) -> Codes:
        """The same weights with positive scales; codes may be one above the grid's range."""
        grouped = self.codes.reshape(*self.scales.shape, -1)
        turned = torch.where((self.scales < 0)[..., None], -grouped, grouped)
        return Codes(turned.reshape(self.codes.shape), self.scales.abs())

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values. In float32 the products are exact; zeros have no sign."""
        rows, groups = self.scales.shape
        grouped = self.codes.reshape(rows, groups, -1).float() * self.scales[..., None]
        grouped += 0.0  # of -0.0, a zero times a negative scale, it makes 0.0
        return grouped.reshape(self.codes.shape).to(dtype)


class OffGridError(ValueError):
    """Weights that are not on the grid that they are said to be on.

    Attributes:
        weights: how many.
    """

    def __init__(self, message: str, weights: int = 0) -> None:
        super().__init__(message)
        self.weights = weights


def codes_of(weight: Tensor, grid: Grid) -> Codes:
    """The codes and scales whose product is the weight, bit for bit in the weight's dtype.

    Where several scales give the same values, the one with the largest codes is taken. A group of zeros
    has scale 1.

    Args:
        weight: `(out_features, in_features)`, of any floating dtype.
        grid: what it should lie on.

    Memory:
        The codes, and at most 100 MB beside them.

    Raises:
        OffGridError: how many weights lie in groups that no scale of the grid gives.
        ValueError: the group size does not divide the inputs.
    """
    rows, columns = weight.shape
    size = grid.columns_per_scale(columns)
    per_row = columns // size
    codes = torch.empty(
        weight.shape, dtype=torch.int8 if grid.symmetric else torch.int16, device=weight.device
    )
    scales = torch.ones(rows, per_row, device=weight.device)
    step = max(1, _CHUNK // max(columns, 1))
    off = 0
    for start in range(0, rows if columns else 0, step):
        part = slice(start, start + step)
        grouped = weight[part].reshape(-1, size)
        found, fits = _scales(grouped, grid)
        steps = _steps(grouped, found, grid).reshape(-1, columns)
        own = Codes.of_steps(steps, found.reshape(-1, per_row), grid)
        codes[part], scales[part] = own.codes, own.scales
        off += int((~fits).sum())
    if off:
        raise OffGridError(
            f"{off * size:,} of {weight.numel():,} weights lie in groups that are not on the grid "
            f"({grid}). They changed after the model was quantised: quantise it again, "
            "hf_sparse.quantize_(model, ...).",
            off * size,
        )
    return Codes(codes, scales)


def lies_on(weight: Tensor, grid: Grid) -> bool:
    """Whether a weight `(out_features, in_features)` lies on a grid, bit for bit in its dtype.

    Memory and errors: as `codes_of`. A weight that does not is told from its first rows.
    """
    rows, columns = weight.shape
    size = grid.columns_per_scale(columns)
    start, most = 0, max(1, _CHUNK // max(columns, 1))
    while start < rows:
        stop = min(start + max(1, min(start, most)), rows)
        if not _scales(weight[start:stop].reshape(-1, size), grid)[1].all():
            return False
        start = stop
    return True


def _scales(grouped: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The scale of each group `(groups, size)`, and whether it gives the group's values."""
    largest = grouped.float().abs().amax(1)
    scales = torch.ones_like(largest)
    fits = largest == 0
    open_groups = torch.nonzero(torch.isfinite(largest) & ~fits)[:, 0]
    bound = grid.largest_step
    sample = grouped[:, :: max(1, grouped.shape[1] // _SAMPLE)]
    # A bfloat16 weight was rounded: the scale may lie beside what the largest weight tells.
    neighbours = (0, 1, -1) if grouped.dtype == torch.bfloat16 else (0,)
    for code in range(bound, 0, -1):
        for neighbour in neighbours:
            if not open_groups.numel():
                return scales, fits
            tried = _as_scale(largest[open_groups] / code, neighbour)
            likely = _gives(sample[open_groups], tried, grid)
            chosen, tried = open_groups[likely], tried[likely]
            right = _gives(grouped[chosen], tried, grid)
            scales[chosen[right]] = tried[right]
            fits[chosen[right]] = True
            open_groups = open_groups[~fits[open_groups]]
    return scales, fits


def _as_scale(values: Tensor, neighbour: int) -> Tensor:
    """The nearest bfloat16 of each value, or the next one above (1) or below (-1) it."""
    return (values.bfloat16().view(torch.int16) + neighbour).view(torch.bfloat16).float()


def _gives(grouped: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Which groups `(groups, size)` are codes of the grid times their scale."""
    values = _steps(grouped, scales, grid).mul_(scales[:, None])
    return (values.to(grouped.dtype) == grouped).all(1)


def _steps(grouped: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """The nearest codes of the groups `(groups, size)`, as floats, of positive scales."""
    steps = (grouped.float() / scales[:, None]).round_()
    lowest = lowest_steps(steps, grid)[:, None]
    return torch.clamp(steps, lowest, lowest + grid.span)


def lowest_steps(steps: Tensor, grid: Grid) -> Tensor:
    """The lowest code of each group, by what its codes with a positive scale would be without bounds.

    Args:
        steps: `(..., size)`, whole numbers as floats.

    Returns:
        `(...)`, floats; the highest code of a group lies `grid.span` above it.
    """
    lowest, highest = steps.amin(-1), steps.amax(-1)
    if grid.symmetric:
        below = torch.full_like(lowest, grid.lowest_code)
        if not grid.has_signs:
            return below
        return torch.where(highest > -lowest, -float(grid.highest_code), below)
    # A bfloat16 hardly tells 255 steps from 256: the shorter side of zero tells the zero point.
    lowest, highest = lowest.clamp_(max=0), highest.clamp_(min=0)
    return torch.where(-lowest > highest, highest - grid.highest_code, lowest)
