"""The penalties of SparseOptimizer: what is shrunk, how, and when a unit becomes zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.optim import prox
from hf_sparse.patterns import NM, GroupPattern, Pattern, Unstructured


@dataclass(frozen=True)
class Penalty:
    """A row of the table `PENALTIES`.

    Attributes:
        summary: a few words for tables.
        patterns: the kinds of pattern that it can give.
        shrink: `(weights, strength, metric, pattern, foreach)`, in place. `strength` is a number
            or a tensor per weight; `metric` the diagonal of Adam's metric per weight, or None.
        distance: `(weight, unit, metric, pattern)` gives for each unit (see
            `hf_sparse.selection`) the strength, in multiples of `unit`, at which it becomes zero:
            added up over steps if `gradual`, in one step if not.
        gradual: whether weights move to zero over many steps.
        adaptive: whether it has a closed form in Adam's metric.
        reweighted: whether each weight has a factor `alpha` of its own.
    """

    summary: str
    patterns: tuple[type[Pattern], ...]
    shrink: Callable[..., None]
    distance: Callable[..., Tensor]
    gradual: bool = True
    adaptive: bool = True
    reweighted: bool = False

    def gives(self, pattern: Pattern) -> bool:
        """Whether its zeros come in the pattern."""
        return isinstance(pattern, self.patterns)

    def check_pattern(self, name: str, pattern: Pattern) -> None:
        """Raise a ValueError if the penalty cannot give the pattern."""
        if not self.gives(pattern):
            fitting = [key for key, other in PENALTIES.items() if other.gives(pattern)]
            raise ValueError(
                f"penalty '{name}' does not give pattern '{pattern}'. Penalties that do: "
                f"{', '.join(fitting)}."
            )


def _shrink_l1(
    weights: Sequence[Tensor],
    strength: prox.Tau,
    metric: Sequence[Tensor] | None,
    pattern: Pattern,
    foreach: bool,
) -> None:
    prox.soft_threshold_(weights, _in_metric(strength, metric), foreach=foreach)


def _shrink_l0(
    weights: Sequence[Tensor],
    strength: float,
    metric: Sequence[Tensor] | None,
    pattern: Pattern,
    foreach: bool,
) -> None:
    if isinstance(pattern, GroupPattern):
        prox.group_hard_threshold_(weights, strength, pattern, metric)
    elif isinstance(pattern, NM):
        prox.nm_hard_threshold_(weights, strength, pattern, metric)
    else:
        prox.hard_threshold_(weights, strength, metric)


def _shrink_groups(
    weights: Sequence[Tensor], strength: float, metric: None, pattern: GroupPattern, foreach: bool
) -> None:
    prox.group_soft_threshold_(weights, strength, pattern)


def _shrink_nm(
    weights: Sequence[Tensor], strength: float, metric: None, pattern: NM, foreach: bool
) -> None:
    prox.nm_shrink_(weights, strength, pattern)


def _in_metric(strength: prox.Tau, metric: Sequence[Tensor] | None) -> prox.Tau:
    """The thresholds of an elementwise prox: the strength divided by the metric."""
    if metric is None:
        return strength
    if isinstance(strength, float | int):
        return [strength / diagonal for diagonal in metric]
    return [alpha / diagonal for alpha, diagonal in zip(strength, metric, strict=True)]


def _distance_l1(
    weight: Tensor, unit: float | Tensor, metric: Tensor | None, pattern: Pattern
) -> Tensor:
    scaled = weight.abs().float() if metric is None else weight.abs() * metric
    return torch.div(scaled, unit)


def _distance_l0(weight: Tensor, unit: float, metric: Tensor | None, pattern: Pattern) -> Tensor:
    squares = weight.float().square()
    losses = squares if metric is None else squares * metric
    if isinstance(pattern, NM):
        lost = (pattern.groups(losses) * pattern.surplus(losses)).sum(dim=1)
        return lost.div(2 * pattern.m * unit)
    return pattern.means(losses).div(2 * unit)


def _distance_groups(weight: Tensor, unit: float, metric: None, pattern: GroupPattern) -> Tensor:
    height, width = pattern.group_shape(*weight.shape)
    return pattern.unit_scores(weight).sqrt() / (math.sqrt(height * width) * unit)


def _distance_nm(weight: Tensor, unit: float, metric: None, pattern: NM) -> Tensor:
    """The surplus weights shrink by `e_N` of the others per strength: to first order."""
    sizes = pattern.groups(weight).abs().float().sort(dim=1, descending=True).values
    speed = sizes[:, : pattern.n].prod(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return sizes[:, pattern.n] / (speed * unit)


PENALTIES = {
    "l1": Penalty("lasso: every weight shrinks alike", (Unstructured,), _shrink_l1, _distance_l1),
    "reweighted_l1": Penalty(
        "small weights shrink more: less bias on what stays",
        (Unstructured,),
        _shrink_l1,
        _distance_l1,
        reweighted=True,
    ),
    "l0": Penalty(
        "hard threshold: what stays is not shrunk",
        (Unstructured, GroupPattern, NM),
        _shrink_l0,
        _distance_l0,
        gradual=False,
    ),
    "group_l2": Penalty(
        "group lasso over blocks, rows, columns or heads",
        (GroupPattern,),
        _shrink_groups,
        _distance_groups,
        adaptive=False,
    ),
    "nm": Penalty(
        "ProxSparse's regulariser of N:M groups", (NM,), _shrink_nm, _distance_nm, adaptive=False
    ),
}


def default_penalty(pattern: Pattern) -> str:
    """The lasso of the pattern's units: the first penalty that gives the pattern gradually."""
    return next(name for name, row in PENALTIES.items() if row.gradual and row.gives(pattern))


# How much of the step each scale takes as the strength of the penalty: see `SparseAdamW`.
SCALES = ("lr", "adaptive", "constant")
