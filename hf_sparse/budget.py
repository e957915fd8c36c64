"""Sparsity from a latency budget: which pattern and how many zeros each layer gets.

Every layer has candidates, a pattern and a sparsity each, with a predicted time
(`runtime/weights/rates.py`) and an error: the share of its output's energy that pruning takes away,
times what that does to the model,

    error = sensitivity * sum of pruned (w_ij ||x_j||)^2 / sum of all (w_ij ||x_j||)^2

Calibration gives the norms of the inputs, and the sensitivity: one layer at a time is pruned to
`PROBE`, and the change of the model's own output, in squares and relative, is divided by the layer's
share. Without calibration both are 1. Of all choices within the budget, the one with
the least sum of errors is wanted: each layer takes the candidate with the least `error + price * time`,
and the price is the smallest that keeps to the budget (Lagrangian relaxation; Everett, 1963,
https://doi.org/10.1287/opre.11.3.399).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from hf_sparse.arguments import check_has_values, check_kinds, check_model
from hf_sparse.calibration.sensitivity import input_norms, lost_energy, sensitivities
from hf_sparse.calibration.windows import checked_batches
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.counts import format_table
from hf_sparse.patterns import Block, Pattern
from hf_sparse.runtime.llvm.jit import DEFAULT_CACHE
from hf_sparse.runtime.llvm.target import named
from hf_sparse.runtime.weights.rates import Rates, calibrate
from hf_sparse.structure.layers import target_layers

LEVELS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975)
# Halvings of the interval that holds the price.
_HALVINGS = 60


@dataclass(frozen=True)
class Choice:
    """What one layer could be. `pattern` is None for a layer that stays dense.

    Attributes:
        name: the layer.
        pattern, sparsity: of its zeros.
        time: predicted, in seconds per token and core.
        error: estimated change of the model's output, see above.
    """

    name: str
    pattern: Pattern | None
    sparsity: float
    time: float
    error: float


@dataclass(frozen=True)
class Allocation:
    """A choice for every layer within a budget; `str` gives a table.

    Attributes:
        choices: one per layer, in the model's order.
        fraction: predicted time of the layers' matrix products over that of the dense ones.
    """

    choices: tuple[Choice, ...]
    fraction: float

    @property
    def sparsity(self) -> tuple[float, ...]:
        """The sparsity of each layer."""
        return tuple(choice.sparsity for choice in self.choices)

    @property
    def configs(self) -> list[SparsityConfig]:
        """For `prune_`, one after another: layers with the same pattern and sparsity together."""
        grouped: dict[tuple[str, float], list[str]] = {}
        for choice in self.choices:
            if choice.pattern is not None:
                key = (str(choice.pattern), choice.sparsity)
                grouped.setdefault(key, []).append(choice.name)
        return [
            SparsityConfig(
                pattern,
                None if Pattern.parse(pattern).implied_sparsity else sparsity,
                targets=names,
            )
            for (pattern, sparsity), names in grouped.items()
        ]

    def __repr__(self) -> str:
        least, most = min(self.sparsity, default=0.0), max(self.sparsity, default=0.0)
        return (
            f"<Allocation: {len(self.choices)} layers, sparsity {least:.3f} to {most:.3f}, predicted "
            f"time {self.fraction:.3f} of dense>"
        )

    def __str__(self) -> str:
        rows = [
            (
                choice.name,
                str(choice.pattern or "dense"),
                f"{choice.sparsity:.3f}",
                f"{choice.error:.4f}",
            )
            for choice in self.choices
        ]
        table = format_table(("layer", "pattern", "sparsity", "error"), rows)
        return f"{table}\npredicted time of the matrix products: {self.fraction:.3f} of dense"


def allocate(
    model: nn.Module,
    budget: str | float,
    batches: Iterable[Mapping[str, Tensor] | Tensor] | None = None,
    *,
    patterns: Sequence[str] = ("unstructured", "block:4x1"),
    targets: str | Sequence[str] | None = None,
    levels: Sequence[float] = LEVELS,
    target: str | None = None,
    cache: Path | str | None = DEFAULT_CACHE,
) -> Allocation:
    """Choose pattern and sparsity of each layer for a latency budget on this machine.

    >>> allocation = hf_sparse.allocate(model, "0.25x", batches)     # doctest: +SKIP
    >>> for config in allocation.configs:                            # doctest: +SKIP
    ...     hf_sparse.prune_(model, config, "wanda", batches)

    Args:
        model: a model on the CPU; it is not changed.
        budget: time of the layers' matrix products, as a fraction of the dense ones: `"0.25x"` or
            0.25. Attention, norms and embeddings cost the same whatever is pruned.
        batches: calibration inputs, as `prune_`'s, which the model sees once per layer; without
            them all layers and inputs count alike, and the choice is no better than uniform sparsity.
        patterns: what layers may choose from; each may also stay dense.
        targets: globs of layer names; those of `SparsityConfig` by default.
        levels: sparsities to choose from, where the pattern does not fix it.
        target, cache: as `hf_sparse.compile`'s. The kernels' speed is measured once per process.

    Raises:
        ValueError: the budget is not a fraction, or less than the sparsest choices need.
    """
    check_model(model, "allocate")
    check_has_values(model, "allocate")
    check_kinds(allocate, {key: value for key, value in locals().items() if key != "budget"})
    wanted = parse_budget(budget)
    parsed = [_of_weights(pattern) for pattern in patterns]
    if not all(0 <= level < 1 for level in levels):
        raise ValueError(f"levels are {list(levels)}; wanted sparsities in [0, 1).")
    if not parsed or not levels:
        raise ValueError(
            f"{'levels' if parsed else 'patterns'} is empty: there is nothing to choose from. Leave it "
            "out for the defaults."
        )
    layers = target_layers(model, SparsityConfig("unstructured", 0.5, targets=targets))
    inputs = None if batches is None else checked_batches(batches, model, "allocate")
    rates = calibrate(named(target), None if cache is None else Path(cache))
    scores = {layer.name: layer.weight.float().abs() for layer in layers}
    weights = dict.fromkeys(scores, 1.0)
    if inputs is not None:
        norms = input_norms(model, layers, inputs)
        scores = {name: score * norms[name] for name, score in scores.items()}
        weights = sensitivities(model, layers, scores, inputs)
    candidates = [
        _candidates(layer.name, scores[layer.name], weights[layer.name], parsed, levels, rates)
        for layer in layers
    ]
    if all(len(options) == 1 for options in candidates):
        raise ValueError(
            f"none of the patterns {', '.join(map(str, parsed))} divides a layer: all stay dense. "
            "Take another pattern, or other targets."
        )
    dense = sum(options[0].time for options in candidates)
    least = sum(min(option.time for option in options) for options in candidates)
    if wanted * dense < least:
        raise ValueError(
            f"budget {wanted:.3f} cannot be kept: the sparsest choices are predicted to take "
            f"{least / dense:.3f} of the dense time. Allow more, or give higher levels."
        )
    chosen = _cheapest(candidates, wanted * dense)
    return Allocation(tuple(chosen), sum(choice.time for choice in chosen) / dense)


def sparsity_for(
    budget: str | float,
    pattern: str,
    *,
    target: str | None = None,
    cache: Path | str | None = DEFAULT_CACHE,
) -> float:
    """The least sparsity at which a pattern's predicted time is within a budget, for training.

    `SparsityCallback` and `Sparsifier` let all layers compete for one number of zeros; this is the
    number that a budget asks for.

    Args:
        budget: time of the layers' matrix products, as a fraction of the dense ones: `"0.25x"` or
            0.25.
        pattern: one that does not fix its sparsity.
        target, cache: as for `hf_sparse.compile`.

    Returns:
        The fraction of zeros, in `[0, 0.99]`.

    Raises:
        ValueError: the budget is not a fraction, the pattern fixes its sparsity, or no sparsity up
            to 0.99 keeps to the budget.
    """
    wanted = parse_budget(budget)
    check_kinds(sparsity_for, locals())
    parsed = _of_weights(pattern)
    if parsed.implied_sparsity is not None:
        raise ValueError(f"pattern '{pattern}' fixes its sparsity at {parsed.implied_sparsity}.")
    rates = calibrate(named(target), None if cache is None else Path(cache))
    dense = _seconds(None, 0.0, rates)
    for percent in range(100):
        if _seconds(parsed, percent / 100, rates) <= wanted * dense:
            return percent / 100
    raise ValueError(f"no sparsity of pattern '{pattern}' keeps to a budget of {wanted:.3f}.")


def _of_weights(notation: str) -> Pattern:
    """A pattern that a kernel can make use of.

    Raises:
        ValueError: it is of whole matrices.
    """
    pattern = Pattern.parse(notation)
    if pattern.whole_matrices:
        raise ValueError(
            f"pattern '{pattern}' takes whole experts, and no layer's time falls with it. For a "
            "smaller mixture take hf_sparse.slim_, or hf_sparse.drop_experts_."
        )
    return pattern


def parse_budget(budget: str | float) -> float:
    """`"0.25x"` or 0.25 as 0.25.

    Raises:
        ValueError: it is neither, or not in (0, 1].
    """
    text = budget.removesuffix("x") if isinstance(budget, str) else budget
    try:
        value = -1.0 if isinstance(text, bool) else float(text)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 < value <= 1:
        raise ValueError(
            f"budget {budget!r}: wanted a fraction of the dense time, such as '0.25x'."
        )
    return value


def _candidates(
    name: str,
    scores: Tensor,
    sensitivity: float,
    patterns: Sequence[Pattern],
    levels: Sequence[float],
    rates: Rates,
) -> list[Choice]:
    """What a layer could be; the first one is dense."""
    size = scores.numel()
    choices = [Choice(name, None, 0.0, size * _seconds(None, 0.0, rates), 0.0)]
    for pattern in patterns:
        try:
            pattern.check_shape(*scores.shape)
        except ValueError:
            continue
        fixed = pattern.implied_sparsity
        for sparsity in levels if fixed is None else [fixed]:
            error = sensitivity * lost_energy(scores, pattern.keep(scores, sparsity))
            time = size * _seconds(pattern, sparsity, rates)
            choices.append(Choice(name, pattern, sparsity, time, error))
    return choices


def _seconds(pattern: Pattern | None, sparsity: float, rates: Rates) -> float:
    """Predicted time of one weight and token on one core, by the kernel that suits best."""
    dense = 2e-9 / rates.rate(4, 1.0)
    if pattern is None:
        return dense
    height = 1
    if isinstance(pattern, Block) and pattern.columns == 1:
        height = max(h for h in rates.speeds if pattern.rows % h == 0)
    density = 1 - sparsity
    return min(dense, 2e-9 * density / rates.rate(height, density))


def _cheapest(candidates: list[list[Choice]], limit: float) -> list[Choice]:
    """The choices with the least error at the smallest price of time that keeps to `limit`."""

    def at(price: float) -> list[Choice]:
        return [
            min(options, key=lambda choice: (choice.error + price * choice.time, choice.time))
            for options in candidates
        ]

    if sum(choice.time for choice in at(0.0)) <= limit:
        return at(0.0)
    low, high = 0.0, 1.0 / limit
    while sum(choice.time for choice in at(high)) > limit:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if sum(choice.time for choice in at(middle)) > limit:
            low = middle
        else:
            high = middle
    return at(high)
