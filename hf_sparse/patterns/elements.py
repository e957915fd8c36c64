"""Patterns of single weights: anywhere, or at most N in each M."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse.patterns.pattern import Pattern
from hf_sparse.patterns.ranking import check_scores, lowest_in_groups, lowest_share


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Single weights anywhere."""

    elementwise: ClassVar[bool] = True
    notations: ClassVar[tuple[str, ...]] = ("unstructured",)

    @classmethod
    def read(cls, notation: str) -> Unstructured | None:
        return cls() if notation == "unstructured" else None

    def __str__(self) -> str:
        return "unstructured"

    def group_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return 1, 1

    def units(self, scores: Tensor) -> Tensor:
        return scores.float()

    def expand(self, pruned: Tensor, scores: Tensor) -> Tensor:
        return pruned

    def keep(self, scores: Tensor, sparsity: float, *, per_row: bool = False) -> Tensor:
        check_scores(scores, sparsity)
        grouped = scores if per_row else scores.reshape(1, -1)
        return ~lowest_share(grouped, sparsity).view(scores.shape)

    def violations(self, weight: Tensor) -> int:
        return 0


@dataclass(frozen=True)
class NM(Pattern):
    """At most `n` nonzeros in each `m` consecutive weights along in_features."""

    n: int
    m: int
    notations: ClassVar[tuple[str, ...]] = ("N:M (2:4, 4:8, ...)",)

    @classmethod
    def read(cls, notation: str) -> NM | None:
        match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", notation, re.ASCII)
        return cls(*map(int, match.groups())) if match else None

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

    @property
    def violation(self) -> str:
        return f"have more than {self.n} nonzeros in {self.m}"

    def group_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return 1, self.m

    def least_span(self, shape: torch.Size, axis: int = 0) -> int:
        return self.m if axis else 1

    def parameters(self, rows: int, columns: int) -> tuple[int, int]:
        return self.n, self.m

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
        check_scores(scores, sparsity)
        return ~self.surplus(scores).view(scores.shape)

    def surplus(self, scores: Tensor) -> Tensor:
        """Mark the M - N lowest scores of each group, of equal ones the first: `(groups, m)`."""
        return lowest_in_groups(self.groups(scores), self.m - self.n)

    def units(self, scores: Tensor) -> Tensor:
        squares = self.groups(scores.float()).square()
        return (squares * self.surplus(scores)).sum(dim=1)

    def expand(self, pruned: Tensor, scores: Tensor) -> Tensor:
        return (self.surplus(scores) & pruned[:, None]).view(scores.shape)

    def violations(self, weight: Tensor) -> int:
        return int(((self.groups(weight) != 0).sum(dim=1) > self.n).sum())
