"""Sparsity patterns: which zeros a weight may have.

A pattern is parsed once from its notation into an immutable value and printed back with `str`:

| notation       | zeros come as                                              | `sparsity` counts |
|----------------|------------------------------------------------------------|-------------------|
| `unstructured` | single weights                                             | weights           |
| `2:4` (N:M)    | at most N nonzeros in each M consecutive weights of a row  | fixed: 1 - N/M    |
| `block:RxC`    | whole blocks of R rows (out) x C columns (in)              | blocks            |
| `row`          | whole rows: one output feature                             | rows              |
| `column`       | whole columns: one input feature                           | columns           |
| `head:D`       | D consecutive rows: the output features of one head        | heads             |
| `head_in:D`    | D consecutive columns: the input features of one head      | heads             |

`head` without a size is completed by `Head.with_size(head_dim)` from the model's config. Where an
attention head is a unit of its own, it is `head_in:D` of the projection behind attention.

Every tensor here is `(out_features, in_features)`; layers that store the transpose (GPT-2's
`Conv1D`) are turned at the edge, never in a pattern.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from hf_sparse.suggestions import meant_pattern, shortened

NOTATIONS = (
    "unstructured",
    "N:M (2:4, 4:8, ...)",
    "block:RxC",
    "row",
    "column",
    "head",
    "head:D",
    "head_in:D",
)


# Groups up to this length are ranked by comparing each pair: faster than selecting, and as exact.
_SHORT = 16


class Pattern(ABC):
    """What the zeros of a weight look like. Immutable; equal when the notation is equal."""

    @property
    def implied_sparsity(self) -> float | None:
        """The sparsity that the pattern itself fixes, or None where it is free."""
        return None

    def check_shape(self, rows: int, columns: int) -> None:
        """Raise a ValueError if the pattern cannot divide a `(rows, columns)` weight."""
        return None

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
        if not isinstance(notation, str):
            raise ValueError(
                f"pattern is a {type(notation).__name__}: {shortened(notation)}. Wanted a string, one "
                f"of {', '.join(NOTATIONS)}.{meant_pattern(str(notation), _read)}"
            )
        if (pattern := _read(notation)) is not None:
            return pattern
        raise ValueError(
            f"unknown pattern {shortened(notation)}. Known patterns: {', '.join(NOTATIONS)}."
            f"{meant_pattern(notation, _read)}"
        )


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Single weights anywhere."""

    def __str__(self) -> str:
        return "unstructured"

    def keep(self, scores: Tensor, sparsity: float, *, per_row: bool = False) -> Tensor:
        _check(scores, sparsity)
        grouped = scores if per_row else scores.reshape(1, -1)
        return ~_lowest_share(grouped, sparsity).view(scores.shape)

    def violations(self, weight: Tensor) -> int:
        return 0


@dataclass(frozen=True)
class NM(Pattern):
    """At most `n` nonzeros in each `m` consecutive weights along in_features."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(
                f"pattern '{self.n}:{self.m}': wanted N:M with 1 <= N < M, as in '2:4': at most N of "
                "M consecutive weights are kept."
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def implied_sparsity(self) -> float:
        return 1 - self.n / self.m

    def check_shape(self, rows: int, columns: int) -> None:
        if columns % self.m:
            raise ValueError(
                f"in_features is {columns}, which is not divisible by M = {self.m} of pattern "
                f"'{self}'. Leave the layer out with `ignore`, or choose another pattern."
            )

    def groups(self, weight: Tensor) -> Tensor:
        """View `(out_features, in_features)` as `(groups, m)`."""
        self.check_shape(*weight.shape)
        return weight.reshape(-1, self.m)

    def keep(self, scores: Tensor, sparsity: float, *, per_row: bool = False) -> Tensor:
        _check(scores, sparsity)
        return ~self.surplus(scores).view(scores.shape)

    def surplus(self, scores: Tensor) -> Tensor:
        """Mark the M - N lowest scores of each group, of equal ones the first: `(groups, m)`."""
        if self.m > _SHORT:
            return lowest(self.groups(scores), self.m - self.n)
        columns = self.groups(scores).unbind(1)
        # The rank of a weight is the number of weights in its group that are pruned before it.
        rank = [torch.zeros_like(column, dtype=torch.int16) for column in columns]
        for first, second in combinations(range(self.m), 2):
            before = columns[first] <= columns[second]
            rank[second] += before
            rank[first] += ~before
        return torch.stack(rank, dim=1) < self.m - self.n

    def violations(self, weight: Tensor) -> int:
        return int(((self.groups(weight) != 0).sum(dim=1) > self.n).sum())


class GroupPattern(Pattern):
    """Weights are zero in whole rectangular groups."""

    @abstractmethod
    def group_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of one group in a `(rows, columns)` weight."""

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
        return _widened(self.blocks(scores)).square().sum(dim=(1, 3))

    def spread(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Repeat a value per group, `(out / R, in / C)`, for each weight of a `shape` weight."""
        height, width = self.group_shape(*shape)
        tiles = units[:, None, :, None].expand(-1, height, -1, width)
        return tiles.reshape(shape)

    def keep(self, scores: Tensor, sparsity: float, *, per_row: bool = False) -> Tensor:
        """As `Pattern.keep`; the score of a group is the sum of its squared scores."""
        _check(scores, sparsity)
        # A power of two as scale: squares neither overflow nor vanish, and ties stay ties.
        exponent = math.frexp(float(scores.max()))[1] if scores.numel() else 0
        units = self.unit_scores(_widened(scores) * 2.0 ** -max(exponent, -120))
        grouped = units if per_row and units.shape[1] > 1 else units.reshape(1, -1)
        kept = ~_lowest_share(grouped, sparsity).view(units.shape)
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

    def __str__(self) -> str:
        return "row"

    def group_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return 1, max(columns, 1)


@dataclass(frozen=True)
class Column(GroupPattern):
    """Whole columns: one input feature each."""

    def __str__(self) -> str:
        return "column"

    def group_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return max(rows, 1), 1


@dataclass(frozen=True)
class Head(GroupPattern):
    """`head_dim` consecutive rows: the output features of one attention head.

    With `inputs` they are columns: what a head hands to the projection behind attention.
    """

    head_dim: int | None = None
    inputs: bool = False

    def __post_init__(self) -> None:
        if self.head_dim is not None and self.head_dim < 1:
            name = "head_in" if self.inputs else "head"
            raise ValueError(f"pattern '{self}': wanted {name}:D with D >= 1, as '{name}:64'.")

    def __str__(self) -> str:
        name = "head_in" if self.inputs else "head"
        return name if self.head_dim is None else f"{name}:{self.head_dim}"

    def with_size(self, head_dim: int) -> Head:
        """The same pattern with its size known."""
        return Head(head_dim, self.inputs)

    def group_shape(self, rows: int, columns: int) -> tuple[int, int]:
        if self.head_dim is None:
            raise ValueError(
                "pattern 'head' has no size. Write it with the rows of one head, as 'head:64'."
            )
        return (max(rows, 1), self.head_dim) if self.inputs else (self.head_dim, max(columns, 1))


_PLAIN: dict[str, Pattern] = {
    "unstructured": Unstructured(),
    "row": Row(),
    "column": Column(),
    "head": Head(),
}
_SIZED: dict[str, Callable[..., Pattern]] = {
    r"(\d{1,4}):(\d{1,4})": NM,
    r"block:(\d{1,6})x(\d{1,6})": Block,
    r"head:(\d{1,6})": Head,
    r"head_in:(\d{1,6})": partial(Head, inputs=True),
}


def _read(notation: str) -> Pattern | None:
    """The pattern of a notation; None: it is none."""
    if notation in _PLAIN:
        return _PLAIN[notation]
    for shape, pattern in _SIZED.items():
        if match := re.fullmatch(shape, notation, re.ASCII):
            return pattern(*map(int, match.groups()))
    return None


def _lowest_share(scores: Tensor, share: float) -> Tensor:
    """Mark `round(share * scores.numel())` scores, as evenly over the rows as whole counts allow."""
    rows = scores.shape[0]
    upto = [round(share * scores.numel()) * row // max(rows, 1) for row in range(rows + 1)]
    counts = torch.tensor(upto, device=scores.device).diff()
    marked = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for count in counts.unique().tolist():
        chosen = counts == count
        if chosen.all():
            return lowest(scores, count)
        marked[chosen] = lowest(scores[chosen], count)
    return marked


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest scores of each row, exactly.

    Of equal scores the one with the lower index is marked first, as a stable ascending sort would
    do; this selects in linear time instead of sorting.

    Args:
        scores: `(rows, columns)`.
        count: `0 <= count <= columns`.

    Returns:
        Boolean `(rows, columns)` with `count` True in each row.
    """
    if count == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    scores = _widened(scores)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below, tied = scores < threshold, scores == threshold
    missing = count - below.sum(dim=1, keepdim=True)
    return below | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= missing))


def _widened(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()


def _check(scores: Tensor, sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; wanted a fraction of zeros in [0, 1).")
    if scores.ndim != 2:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}; wanted (out_features, in_features)."
        )
    if not torch.isfinite(scores).all():
        raise ValueError("scores contain NaN or infinity; wanted finite scores.")
