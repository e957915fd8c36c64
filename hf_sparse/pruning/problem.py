"""What a layer solver is given, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_sparse.calibration.input_statistics import InputStatistics, Seen
from hf_sparse.calibration.linalg import regularised
from hf_sparse.patterns import Pattern
from hf_sparse.quantization import Grid


@dataclass(frozen=True)
class FewTokens:
    """A layer saw fewer tokens than it has input features, and got more damping for it.

    Attributes:
        tokens, features: how many.
        damping: that would have been used.
        raised: that was used, `damping * features / tokens`.
    """

    tokens: int
    features: int
    damping: float
    raised: float

    @staticmethod
    def remark(found: Sequence[FewTokens]) -> str:
        """One sentence about all layers for which this holds."""
        worst = max(found, key=lambda one: one.raised)
        if len(set(found)) == 1:
            return (
                f"saw only {worst.tokens} calibration tokens for {worst.features} input features: the "
                f"Gram matrix has rank {worst.tokens} at most, damping was raised from "
                f"{worst.damping:g} to {worst.raised:.2g}. Give more calibration data."
            )
        return (
            "saw fewer calibration tokens than they have input features, the least "
            f"{worst.tokens} for {worst.features}: damping was raised in this proportion, from "
            f"{worst.damping:g} to {worst.raised:.2g} at most. Give more calibration data."
        )


class Notes:
    """Remarks about layers for the report; the same remark about many layers is one line."""

    def __init__(self) -> None:
        self._layers: dict[str, list[str]] = {}
        self._few: dict[str, FewTokens] = {}
        self.errors: dict[str, float] = {}  # of layers that were rounded, relative

    def add(self, layers: Sequence[str], remark: str) -> None:
        """Note something about layers, as a sentence that goes on after their names."""
        self._layers.setdefault(remark, []).extend(layers)

    def merge(self, others: Sequence[Notes]) -> None:
        """Take over the remarks of others."""
        for other in others:
            self._few.update(other._few)
            self.errors.update(other.errors)
            for remark, layers in other._layers.items():
                self.add(layers, remark)

    def add_few(self, layers: Sequence[str], found: FewTokens) -> None:
        """Note that layers saw too few tokens; however many each saw, that is one remark."""
        self._few.update(dict.fromkeys(layers, found))

    def lines(self) -> tuple[str, ...]:
        """One line for each remark."""
        remarks = list(self._layers.items())
        if self._few:
            remarks.append((FewTokens.remark(list(self._few.values())), list(self._few)))
        return tuple(
            f"{layers[0]}{f' and {len(layers) - 1} more' if len(layers) > 1 else ''} {remark}"
            for remark, layers in remarks
        )


@dataclass
class Problem:
    """Prune layers that share their inputs, so that their outputs change little.

    Attributes:
        names: of the layers.
        weights: dense, `(out_features, in_features)` each, fp32; not to be changed.
        statistic: Gram matrix of the inputs, `(in_features, in_features)`, or, for solvers that
            need no more, their norms `(in_features,)`.
        tokens: how many inputs it sums up.
        pattern: of the zeros.
        sparsities: of each weight.
        notes: for the report.
        grid: that kept weights are rounded to; None: they may have any values.
    """

    names: Sequence[str]
    weights: Sequence[Tensor]
    statistic: Tensor
    tokens: int
    pattern: Pattern
    sparsities: Sequence[float]
    notes: Notes = field(default_factory=Notes)
    grid: Grid | None = None

    @classmethod
    def of(
        cls, seen: Seen, pattern: Pattern, sparsities: dict[str, float], notes: Notes
    ) -> Problem:
        """The problem of layers and what they saw, with the layers' weights as they are now."""
        names = [layer.name for layer in seen.layers]
        weights = [layer.weight.float() for layer in seen.layers]
        shares = [sparsities[name] for name in names]
        return cls(names, weights, seen.statistic, seen.tokens, pattern, shares, notes)

    @property
    def norms(self) -> Tensor:
        """L2 norm of each input feature, `(in_features,)`."""
        return self.statistic if self.statistic.ndim == 1 else self.statistic.diagonal().sqrt()

    @property
    def gram(self) -> Tensor:
        """The Gram matrix."""
        if self.statistic.ndim == 1:
            raise ValueError("only norms of the inputs were collected; wanted Gram matrices.")
        return self.statistic

    def scaled_gram(self, damping: float) -> tuple[Tensor, Tensor]:
        """The Gram matrix of inputs that are scaled to unit norm, damped, and the norms.

        Args:
            damping: added to its diagonal of 1; see `damping`.
        """
        gram = regularised(self.gram, 0.0)
        norms = gram.diagonal().sqrt()
        gram = gram / norms[:, None] / norms
        gram.diagonal().add_(self.damping(damping))
        return gram, norms

    @property
    def joined(self) -> Tensor:
        """All weights, one below the other, a copy."""
        return torch.cat(list(self.weights))

    @property
    def dead(self) -> Tensor:
        """Which inputs are always zero, `(in_features,)`: their weights go first, at no cost.

        Those that the pattern keeps stay as they are: an input may be dead on this data alone.
        """
        return self.gram.diagonal() == 0

    def split(self, joined: Tensor) -> list[Tensor]:
        """Undo `joined` for a tensor of its rows."""
        return list(joined.split([len(weight) for weight in self.weights]))

    def keep(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """The masks of the weights to keep, those of highest score, of each layer."""
        pairs = zip(scores, self.sparsities, strict=True)
        return [self.pattern.keep(score, sparsity) for score, sparsity in pairs]

    def note(self, remark: str) -> None:
        """Tell the report something about these layers."""
        self.notes.add(self.names, remark)

    def damping(self, least: float) -> float:
        """The damping to use: `least`, and more when there are fewer tokens than input features."""
        features = self.statistic.shape[-1]
        if self.tokens >= features:
            return least
        raised = least * features / max(self.tokens, 1)
        self.notes.add_few(self.names, FewTokens(self.tokens, features, least, raised))
        return raised

    def note_damping(self, wanted: float, used: float) -> None:
        """Tell the report if a factorisation needed more damping than wanted."""
        if used > wanted:
            self.note(f"needed damping {used:.2g} instead of {wanted:.2g} to be factorised.")


# Pruned weights for a problem, zeros exactly where pruned.
Solve = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Solver:
    """A function that prunes layers, and what it has to know of their inputs.

    Attributes:
        solve: `solve(problem, **options)`.
        statistic: `Norms` or `Grams`.
        updates: whether it changes the weights that it keeps.
        rounds: whether it rounds them to a problem's grid, too.
        is_decided: whether it knows the zeros, whatever the layers see.
    """

    solve: Solve
    statistic: type[InputStatistics]
    updates: bool
    rounds: bool = False
    is_decided: bool = False


def by_scores(problem: Problem, scores: Sequence[Tensor]) -> list[Tensor]:
    """The weights with those of lowest score zeroed; the others stay as they are."""
    masks = problem.keep(scores)
    return [weight * mask for weight, mask in zip(problem.weights, masks, strict=True)]
