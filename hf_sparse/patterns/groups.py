"""Patterns of whole groups: blocks, rows, columns, heads and experts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse.patterns.pattern import Pattern
from hf_sparse.patterns.ranking import check_scores, lowest_share, widened


class GroupPattern(Pattern):
    """Weights are zero in whole rectangular groups."""

    def check_shape(self, rows: int, columns: int) -> None:
        height, width = self.group_shape(rows, columns)
        if rows % height or columns % width:
            raise ValueError(
                f"a weight of shape ({rows}, {columns}) cannot be divided into groups of "
                f"{height} x {width} (out x in), as pattern '{self}' wants. Leave the layer out with "
                "`ignore`, or choose another pattern."
            )

    def blocks(self, weight: Tensor) -> Tensor:
        """View `(out, in)` as `(out / R, R, in / C, C)` for groups of R x C."""
        rows, columns = weight.shape
        self.check_shape(rows, columns)
        height, width = self.group_shape(rows, columns)
        return weight.reshape(rows // height, height, columns // width, width)

    def unit_scores(self, scores: Tensor) -> Tensor:
        """The score of each group, the sum of its squared scores: `(out / R, in / C)`."""
        return widened(self.blocks(scores)).square().sum(dim=(1, 3))

    def least_span(self, shape: torch.Size, axis: int = 0) -> int:
        return self.group_shape(*shape)[axis]

    def units(self, scores: Tensor) -> Tensor:
        height, width = self.group_shape(*scores.shape)
        return self.unit_scores(scores) / (height * width)

    def expand(self, pruned: Tensor, scores: Tensor) -> Tensor:
        return self.spread(pruned, scores.shape)

    def sums(self, values: Tensor) -> Tensor:
        return self.blocks(values).sum(dim=(1, 3))

    def means(self, values: Tensor) -> Tensor:
        return self.blocks(values).mean(dim=(1, 3))

    def spread(self, values: Tensor, shape: torch.Size) -> Tensor:
        height, width = self.group_shape(*shape)
        tiles = values[:, None, :, None].expand(-1, height, -1, width)
        return tiles.reshape(shape)

    def keep(self, scores: Tensor, sparsity: float, *, per_row: bool = False) -> Tensor:
        """As `Pattern.keep`; the score of a group is the sum of its squared scores."""
        check_scores(scores, sparsity)
        # A power of two as scale: squares neither overflow nor vanish, and ties stay ties.
        exponent = math.frexp(float(scores.max()))[1] if scores.numel() else 0
        units = self.unit_scores(widened(scores) * 2.0 ** -max(exponent, -120))
        grouped = units if per_row and units.shape[1] > 1 else units.reshape(1, -1)
        kept = ~lowest_share(grouped, sparsity).view(units.shape)
        return self.spread(kept, scores.shape)

    def violations(self, weight: Tensor) -> int:
        nonzero = self.blocks(weight) != 0
        some, every = nonzero.any(dim=3).any(dim=1), nonzero.all(dim=3).all(dim=1)
        return int((some & ~every).sum())


@dataclass(frozen=True)
class Block(GroupPattern):
    """Whole blocks of `rows` (out) x `columns` (in) weights."""

    rows: int
    columns: int
    notations: ClassVar[tuple[str, ...]] = ("block:RxC",)

    @classmethod
    def read(cls, notation: str) -> Block | None:
        match = re.fullmatch(r"block:(\d{1,6})x(\d{1,6})", notation, re.ASCII)
        return cls(*map(int, match.groups())) if match else None

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"pattern '{self}': wanted block:RxC with R, C >= 1, as 'block:4x1'.")

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.columns}"

    def group_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return self.rows, self.columns


@dataclass(frozen=True)
class Row(GroupPattern):
    """Whole rows: one output feature each."""

    unit_layer: ClassVar[str | None] = "up"
    notations: ClassVar[tuple[str, ...]] = ("row",)

    @classmethod
    def read(cls, notation: str) -> Row | None:
        return cls() if notation == "row" else None

    def __str__(self) -> str:
        return "row"

    def group_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return 1, max(columns, 1)


@dataclass(frozen=True)
class Column(GroupPattern):
    """Whole columns: one input feature each."""

    unit_layer: ClassVar[str | None] = "down"
    notations: ClassVar[tuple[str, ...]] = ("column",)

    @classmethod
    def read(cls, notation: str) -> Column | None:
        return cls() if notation == "column" else None

    def __str__(self) -> str:
        return "column"

    @property
    def whole_columns(self) -> bool:
        return True

    def group_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return max(rows, 1), 1


@dataclass(frozen=True)
class Head(GroupPattern):
    """`head_dim` consecutive rows: the output features of one attention head.

    With `inputs` they are columns: what a head hands to the projection behind attention.
    """

    head_dim: int | None = None
    inputs: bool = False
    unit_layer: ClassVar[str | None] = "out"
    notations: ClassVar[tuple[str, ...]] = ("head", "head:D", "head_in:D")

    @classmethod
    def read(cls, notation: str) -> Head | None:
        if notation == "head":
            return cls()
        match = re.fullmatch(r"head(_in)?:(\d{1,6})", notation, re.ASCII)
        return cls(int(match[2]), inputs=match[1] is not None) if match else None

    def __post_init__(self) -> None:
        if self.head_dim is not None and self.head_dim < 1:
            name = "head_in" if self.inputs else "head"
            raise ValueError(f"pattern '{self}': wanted {name}:D with D >= 1, as '{name}:64'.")

    def __str__(self) -> str:
        name = "head_in" if self.inputs else "head"
        return name if self.head_dim is None else f"{name}:{self.head_dim}"

    @property
    def whole_columns(self) -> bool:
        return self.inputs or not self.is_sized  # whole heads become columns where they are sized

    @property
    def is_sized(self) -> bool:
        return self.head_dim is not None

    def with_size(self, head_dim: int) -> Head:
        return self if self.is_sized else Head(head_dim, self.inputs)

    def group_shape(self, rows: int, columns: int) -> tuple[int, int]:
        if self.head_dim is None:
            raise ValueError(
                "pattern 'head' has no size. Write it with the rows of one head, as 'head:64'."
            )
        return (max(rows, 1), self.head_dim) if self.inputs else (self.head_dim, max(columns, 1))


@dataclass(frozen=True)
class Expert(GroupPattern):
    """Whole experts of a mixture: all matrices of one are zero, or none.

    A matrix is one unit, so that none alone tells which experts go: `hf_sparse.prune_` chooses.
    """

    whole_matrices: ClassVar[bool] = True
    notations: ClassVar[tuple[str, ...]] = ("expert",)

    @classmethod
    def read(cls, notation: str) -> Expert | None:
        return cls() if notation == "expert" else None

    def __str__(self) -> str:
        return "expert"

    def group_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return max(rows, 1), max(columns, 1)
