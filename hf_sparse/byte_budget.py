"""Which layers a model can have in few bits: those that its output misses least, for a budget of bytes.

One layer at a time is rounded to the grid, and the change of the model's own output is measured, in
squares and relative:

    error_l = |f(x; W_l rounded) - f(x)|^2 / |f(x)|^2

A layer that stays as it is costs the bytes that rounding would have saved. Layers are kept in the order
of error over bytes, the largest first, while the budget has room for them: the greedy rule of Dantzig
for the knapsack (1957, https://doi.org/10.1287/opre.5.2.266). Errors of single layers are added, as if
layers did not meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from hf_sparse.arguments import check_has_values, check_kinds, check_model
from hf_sparse.budget import parse_budget
from hf_sparse.calibration.sensitivity import input_norms, output_changes
from hf_sparse.calibration.windows import checked_batches
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.counts import format_table
from hf_sparse.pruning.bit_counts import bits_a_weight
from hf_sparse.pruning.grid_rounding import check_can_round
from hf_sparse.quantization import rounded
from hf_sparse.structure.layers import TargetLayer, promised_config
from hf_sparse.structure.targets import Targets


@dataclass(frozen=True)
class LayerBits:
    """One layer, and what few bits would do to it.

    Attributes:
        name: of the layer.
        error: change of the model's output when this layer alone is rounded, in squares, relative.
        nbytes: of its weight as it is.
        few: of its weight on the grid.
        is_kept: whether it stays as it is.
    """

    name: str
    error: float
    nbytes: int
    few: int
    is_kept: bool = False


@dataclass(frozen=True)
class BitBudget:
    """Which layers stay as they are; `str` gives a table, those with the largest errors first.

    Attributes:
        layers: in the model's order.
        config: for `quantize_(model, plan.config, ...)`: its `ignore` names the layers that stay.
    """

    layers: tuple[LayerBits, ...]
    config: SparsityConfig

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of the layers that stay as they are."""
        return tuple(layer.name for layer in self.layers if layer.is_kept)

    @property
    def fraction(self) -> float:
        """Bytes of all layers' weights over those of the weights as they are."""
        found = sum(layer.nbytes if layer.is_kept else layer.few for layer in self.layers)
        return found / sum(layer.nbytes for layer in self.layers)

    @property
    def error(self) -> float:
        """The sum of the errors of the layers that are rounded."""
        return sum(layer.error for layer in self.layers if not layer.is_kept)

    def __repr__(self) -> str:
        return (
            f"<BitBudget: {self.config.grid}, {len(self.kept)} of {len(self.layers)} layers stay as "
            f"they are, {self.fraction:.3f} of the bytes; print it>"
        )

    def __str__(self) -> str:
        grid = str(self.config.grid)
        rows = [
            (layer.name, "as it is" if layer.is_kept else grid, f"{layer.error:.2e}")
            for layer in sorted(self.layers, key=lambda layer: -layer.error)
        ]
        table = format_table(("layer", "weights", "error of rounding it"), rows)
        whole = sum(layer.error for layer in self.layers)
        return (
            f"{table}\n{self.fraction:.3f} of the bytes; errors of the rounded layers "
            f"{self.error:.2e}, of all {whole:.2e}"
        )


def bit_budget(
    model: nn.Module,
    budget: str | float,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    *,
    bits: int = 4,
    group_size: int | None = 32,
    symmetric: bool = True,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
) -> BitBudget:
    """Choose the layers that are worth their bytes, and leave them out of a model's grid of few bits.

    >>> plan = hf_sparse.bit_budget(model, "0.2x", batches, bits=4)    # doctest: +SKIP
    >>> hf_sparse.quantize_(model, plan.config, batches=batches)       # doctest: +SKIP

    Args:
        model: a dense model; it is not changed.
        budget: bytes of the layers' weights, as a fraction of what they take now: `"0.2x"` or 0.2.
        batches: calibration inputs, as `prune_`'s, which the model sees once per layer: a few suffice.
        bits, group_size, symmetric: the grid, as `quantize_`'s.
        targets, ignore: globs of layer names; those of `SparsityConfig` by default.

    Returns:
        The layers, with the error of rounding each, and the config to quantise with.

    Memory: the model, its outputs for the batches, and some copies of the largest weight.

    Raises:
        ValueError: the budget is no fraction, or less than the layers take on the grid; the model has
            zeros that are promised, which a config that leaves layers out would give up; or weights
            that cannot be rounded: see `quantize_`.
    """
    check_model(model, "bit_budget")
    check_has_values(model, "bit_budget")
    check_kinds(bit_budget, {key: value for key, value in locals().items() if key != "budget"})
    wanted = parse_budget(budget)
    _check_dense(model)
    config = SparsityConfig(
        "unstructured",
        0.0,
        targets=targets,
        ignore=ignore,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
    )
    meant = Targets.of(model, config)
    check_can_round(model, meant)
    layers = meant.layers
    inputs = checked_batches(batches, model, "bit_budget")
    grid = config.grid
    assert grid is not None
    norms = input_norms(model, layers, inputs)
    few: dict[str, int] = {}

    def on_grid(layer: TargetLayer) -> Tensor:
        weight = rounded(layer.weight, grid, norms[layer.name].square())
        few[layer.name] = round(weight.numel() * bits_a_weight(weight, grid, None) / 8)
        return weight

    errors = output_changes(model, layers, on_grid, inputs)
    found = [
        LayerBits(
            layer.name,
            errors[layer.name],
            layer.weight.numel() * layer.weight.element_size(),
            few[layer.name],
        )
        for layer in layers
    ]
    chosen = _kept(found, wanted)
    kept = tuple(layer.name for layer in chosen if layer.is_kept)
    return BitBudget(tuple(chosen), replace(config, ignore=(*config.ignore, *kept)))


def _check_dense(model: nn.Module) -> None:
    """Refuse a model whose zeros are promised."""
    before = promised_config(model)
    if before is not None and (before.sparsity or before.bits):
        raise ValueError(
            f"the model is promised {before!r}, and a config that leaves layers out would give up what "
            "is promised of them. Take the dense model, and prune what quantize_ leaves; or round all "
            "layers: quantize_(model, bits=...)."
        )


def _kept(layers: Sequence[LayerBits], wanted: float) -> list[LayerBits]:
    """The layers, with those that stay as they are within the budget.

    Raises:
        ValueError: it is less than all layers take on the grid.
    """
    dense, least = sum(layer.nbytes for layer in layers), sum(layer.few for layer in layers)
    room = wanted * dense - least
    if room < 0:
        raise ValueError(
            f"budget {wanted:.3f} cannot be kept: with all layers on the grid the weights take "
            f"{least / dense:.3f} of their bytes. Allow more, or take fewer bits or larger groups."
        )
    kept = set()
    for layer in sorted(layers, key=lambda one: -one.error / max(one.nbytes - one.few, 1)):
        cost = layer.nbytes - layer.few
        if cost <= room:
            kept.add(layer.name)
            room -= cost
    return [replace(layer, is_kept=layer.name in kept) for layer in layers]
