"""What all patterns answer: the units that they prune, and how weights map to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse.suggestions import meant_pattern, shortened


class Pattern(ABC):
    """What the zeros of a weight look like. Immutable; equal when the notation is equal.

    Attributes:
        elementwise: zeros are single weights anywhere, so that any shape and order of weights does.
        unit_layer: the layer of a block where a unit is a whole neuron or head: a field of
            `hf_sparse.structure.parts.Parts`. None: units mean nothing to a block.
        whole_matrices: a unit is a whole matrix, and which units go is a choice among matrices.
        notations: how the pattern is written, for errors and help.
        violation: what a group does that breaks the pattern, for errors: it follows "groups".
    """

    elementwise: ClassVar[bool] = False
    unit_layer: ClassVar[str | None] = None
    whole_matrices: ClassVar[bool] = False
    notations: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def read(cls, notation: str) -> Pattern | None:
        """The pattern that is written so; None: it is none of this kind."""
        return None

    @property
    def implied_sparsity(self) -> float | None:
        """The sparsity that the pattern promises of each group, or None where it is free."""
        return None

    @property
    def violation(self) -> str:
        return "are zero in part"

    @property
    def whole_columns(self) -> bool:
        """Whether zeros are whole columns: all rows keep the same inputs."""
        return False

    @property
    def is_sized(self) -> bool:
        """Whether no size is left to be completed from a model."""
        return True

    def with_size(self, head_dim: int) -> Pattern:
        """The same pattern, with the size of heads if that is left to be completed."""
        return self

    def check_shape(self, rows: int, columns: int) -> None:
        """Raise a ValueError if the pattern cannot divide a `(rows, columns)` weight."""
        return None

    @abstractmethod
    def group_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of one group in a `(rows, columns)` weight."""

    def parameters(self, rows: int, columns: int) -> tuple[int, ...]:
        """What its storage formats write into the layout of a `(rows, columns)` weight."""
        return self.group_shape(rows, columns)

    def least_span(self, shape: torch.Size, axis: int = 0) -> int:
        """Consecutive rows of a weight that belong together: chunks and shards may not cut them.

        Args:
            shape: of the weight, `(out_features, in_features)`.
            axis: 1 for consecutive columns instead.
        """
        return 1

    def num_units(self, rows: int, columns: int) -> int:
        """How many units a `(rows, columns)` weight has."""
        height, width = self.group_shape(rows, columns)
        return (rows // height) * (columns // width)

    @abstractmethod
    def units(self, scores: Tensor) -> Tensor:
        """The score of each unit, by which units of different weights compare.

        Args:
            scores: importance of each weight, `>= 0`, `(out_features, in_features)`.

        Returns:
            fp32 or fp64. Unstructured: the scores. Groups: mean of the squared scores,
            `(out / R, in / C)`. N:M: sum of the squared scores that the group would lose, `(groups,)`.
        """

    @abstractmethod
    def expand(self, pruned: Tensor, scores: Tensor) -> Tensor:
        """The weights that go with pruned units (as `units` orders them): boolean, as `scores`."""

    def sums(self, values: Tensor) -> Tensor:
        """The sum over the weights that stay or go as one; single weights as they are."""
        return values

    def means(self, values: Tensor) -> Tensor:
        """The mean over the weights that stay or go as one; single weights as they are."""
        return values

    def spread(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Give the weights that stay or go as one the same of `values`, ordered as `sums`."""
        return values

    @abstractmethod
    def keep(self, scores: Tensor, sparsity: float, *, per_row: bool = False) -> Tensor:
        """Choose the weights to keep: those of highest score that the pattern allows.

        Args:
            scores: importance of each weight, finite and `>= 0`, `(out_features, in_features)`.
            sparsity: fraction of units (see the module's table) to prune, in `[0, 1)`.
            per_row: choose within each row (row of blocks) instead of over the whole matrix;
                the counts of two rows differ by at most 1. It has no meaning for N:M, `row`,
                `column` and `head`, and changes nothing there.

        Returns:
            Boolean mask of `scores.shape`. Exactly `round(sparsity * units)` units are False; of
            units with equal scores the one with the lower index is pruned first.

        Raises:
            ValueError: the pattern does not divide the shape, or a score is not finite.
        """

    @abstractmethod
    def violations(self, weight: Tensor) -> int:
        """Count the groups of `weight` `(out_features, in_features)` that break the pattern.

        N:M: groups with more than N nonzeros. Blocks, rows, columns, heads: groups that are partly
        zero. Unstructured: always 0, since every set of zeros is allowed.
        """

    def follows(self, weight: Tensor) -> bool:
        """Whether no group of `weight` `(out_features, in_features)` breaks the pattern."""
        return self.violations(weight) == 0

    @staticmethod
    def parse(notation: str | Pattern) -> Pattern:
        """Read a pattern from its notation; a Pattern is returned as it is.

        Raises:
            ValueError: not one of the notations.
        """
        if isinstance(notation, Pattern):
            return notation
        known = ", ".join(notation for kind in Pattern.kinds() for notation in kind.notations)
        if not isinstance(notation, str):
            raise ValueError(
                f"pattern is a {type(notation).__name__}: {shortened(notation)}. Wanted a string, one "
                f"of {known}.{meant_pattern(str(notation), _read)}"
            )
        if (pattern := _read(notation)) is not None:
            return pattern
        raise ValueError(
            f"unknown pattern {shortened(notation)}. Known patterns: {known}."
            f"{meant_pattern(notation, _read)}"
        )

    @classmethod
    def kinds(cls) -> Iterator[type[Pattern]]:
        """The kinds of patterns that have a notation."""
        for kind in cls.__subclasses__():
            if kind.notations:
                yield kind
            yield from kind.kinds()


def _read(notation: str) -> Pattern | None:
    """The pattern of a notation; None: it is none."""
    return next(filter(None, (kind.read(notation) for kind in Pattern.kinds())), None)
