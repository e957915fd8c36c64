"""What a config promises of zeros, and what weights hold of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.structure.layers import TargetLayer, check_divides

# A promise that is nearer to what is held than this is as good as kept.
_MARGIN = 0.005
# Shares are promised to this many parts, rounded down.
_PARTS = 10_000


@dataclass
class Held:
    """The zeros of the targets of a config, counted by what its pattern prunes as a whole.

    Attributes:
        config: what is asked of them.
        zero, units: units that are zero, and all of them.
        least: units that the config's sparsity makes zero, rounded down in each weight, unless that is
            a unit itself.
    """

    config: SparsityConfig
    zero: int = 0
    units: int = 0
    least: float = 0

    @classmethod
    def by(cls, config: SparsityConfig, layers: Iterable[TargetLayer]) -> Held:
        """Count the weights of layers."""
        held = cls(config)
        for layer in layers:
            held.add(layer.weight_name, layer.weight)
        return held

    def add(self, name: str, weight: Tensor) -> None:
        """Count one more weight `(out_features, in_features)`; N:M promises nothing of all units.

        Raises:
            ValueError: the pattern cannot divide the weight; the message names it.
        """
        pattern = self.config.pattern
        if pattern.implied_sparsity is not None:
            return
        check_divides(pattern, name, *weight.shape)
        # Where units are single weights, they are counted without a copy.
        nonzero = weight if pattern.elementwise else pattern.units((weight != 0).float())
        units = nonzero.numel()
        self.zero += int((nonzero == 0).count_nonzero())
        self.units += units
        least = self.config.sparsity * units
        self.least += least if self.config.pattern.whole_matrices else math.floor(least)

    @property
    def share(self) -> float:
        """The share of units that are zero, rounded down; less than 1, as a config's sparsity."""
        whole = self.zero * _PARTS // max(self.units, 1)
        return min(whole, _PARTS - 1) / _PARTS

    @property
    def lacks(self) -> bool:
        """Whether fewer units are zero than the config asks for."""
        return self.zero < self.least - _MARGIN * self.units

    @property
    def exceeds(self) -> bool:
        """Whether more units are zero than the config asks for.

        Weights of few bits that rounding made zero are no promise.
        """
        more = self.units > 0 and self.share > self.config.sparsity + _MARGIN
        return more and self.config.bits is None

    def is_less_than(self, sparsity: float) -> bool:
        """Whether the share is below a sparsity by more than a few zeros."""
        return self.share < sparsity - _MARGIN

    @property
    def promise(self) -> SparsityConfig:
        """The config, with the sparsity that is held."""
        if not self.lacks and not self.exceeds:
            return self.config
        return with_sparsity(self.config, self.share)

    def notes(self) -> tuple[str, ...]:
        """A sentence for a report if there are more zeros than were asked for."""
        if not self.exceeds:
            return ()
        return (
            f"sparsity {self.config.sparsity:.4g} was asked for, but the targets had more zeros "
            f"already, and keep them: {self.share:.4f} of pattern '{self.config.pattern}' are zero, "
            "which is what config.json will promise.",
        )


def with_sparsity(config: SparsityConfig, sparsity: float) -> SparsityConfig:
    """The config with another sparsity."""
    return replace(config, sparsity=sparsity)
