"""The zeros of a whole model, for the head of its card: those of earlier prunings too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_sparse.checkpoint.implied import is_sparse
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.patterns import Pattern, Unstructured
from hf_sparse.provenance.values import Step
from hf_sparse.report import SparsityReport, TensorSparsity, count_zeros
from hf_sparse.structure.targets import Targets


@dataclass(frozen=True)
class Overview:
    """What a model has of zeros.

    Attributes:
        targets: exact counts of the config's targets, and the zeros of all else.
        others: of the other matrices in the blocks.
        patterns: of the weights that have zeros.
    """

    targets: SparsityReport
    others: tuple[TensorSparsity, ...]
    patterns: tuple[str, ...]

    @classmethod
    def of(
        cls,
        targets: SparsityReport,
        others: Sequence[TensorSparsity],
        patterns: Mapping[str, Pattern],
    ) -> Overview:
        """Find the patterns that are held.

        Args:
            targets, others: as the attributes. Violations are those of the patterns of the weights.
            patterns: what the weights were pruned to, by name.
        """
        anything = Unstructured()
        patterns_found = {
            str(anything if count.violations else patterns.get(count.name, anything))
            for count in (*targets.tensors, *others)
            if is_sparse(count)
        }
        return cls(targets, tuple(others), tuple(sorted(patterns_found)))

    @property
    def is_sparse(self) -> bool:
        """Whether any weight has more zeros than chance makes."""
        return bool(self.patterns)

    @property
    def has_other_zeros(self) -> bool:
        """Whether the targets are not all that is sparse."""
        return any(map(is_sparse, self.others))

    @property
    def zeros(self) -> int:
        """Zeros in the targets, and in the other matrices of the blocks."""
        return self.targets.zeros + sum(count.zeros for count in self.others)

    @property
    def numel(self) -> int:
        """Weights in both."""
        return self.targets.numel + sum(count.numel for count in self.others)


def overview(
    model: Any, targets: Targets, measured: SparsityReport, steps: Sequence[Step]
) -> Overview:
    """Count the matrices of the blocks that were not measured.

    Args:
        model: any model.
        targets: of the config that it is saved with.
        measured: counts of them, or of more.
        steps: what was done to the model.
    """
    patterns = patterns_by_weight(model, targets, steps)
    counted = {count.name for count in measured.tensors}
    others = [
        count_other(layer.weight_name, layer.weight, patterns)
        for layer in targets.blocks
        if layer.weight_name not in counted
    ]
    return Overview.of(measured, others, patterns)


def count_other(name: str, weight: Any, patterns: Mapping[str, Pattern]) -> TensorSparsity:
    """Count a weight `(out_features, in_features)` that is no target, and what breaks its N:M."""
    pattern = patterns.get(name, Unstructured())
    promises = pattern.implied_sparsity is not None
    return count_zeros(name, weight, pattern if promises else Unstructured())


def patterns_by_weight(model: Any, targets: Targets, steps: Sequence[Step]) -> dict[str, Pattern]:
    """What the layers of a model were pruned to: as targets, or by the last step that names them."""
    found: dict[str, Pattern] = {}
    for step in steps:
        if step.pattern is None:
            continue
        try:
            asked = SparsityConfig(step.pattern, step.sparsity, step.targets, step.ignore)
            pruned = Targets.of(model, asked)
        except ValueError:  # of layers that are gone, or written by hand: what is measured is told
            continue
        if pruned.whole_units:  # heads and neurons go from other layers too
            for layer in pruned.blocks:
                found.setdefault(layer.weight_name, pruned.pattern)
        found.update({layer.weight_name: pruned.pattern for layer in pruned.layers})
    found.update({layer.weight_name: targets.pattern for layer in targets.layers})
    return found
