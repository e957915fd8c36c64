"""A training with all that it is given; its learning rate may be chosen by short runs on its data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_sparse.calibration.losses import NotFiniteError
from hf_sparse.recovery.held_out import HeldOut, held_out_loss
from hf_sparse.recovery.methods import Recovery
from hf_sparse.recovery.training import train
from hf_sparse.structure.grids import Gridded

SEARCH = "search"
# Rates that are tried, over the method's own.
_FACTORS = (1.0, 1 / 3, 3.0)
# Batches of a trial: this share of the data, within bounds.
_SHARE, _LEAST, _MOST = 8, 8, 32


def chosen_rate(
    recovery: Recovery,
    trained: nn.Module,
    batches: Sequence[dict[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    **settings: Any,
) -> float:
    """The rate after whose short run, a warm-up and a cosine of its own, the held-out loss is least.

    If the lowest or the highest of the rates wins it is taken as it is; a run whose loss is not finite
    loses. The model is as before at the end.

    Args:
        recovery: with the rate in the middle.
        trained: what `recovery.prepared` gave.
        batches: to train on; the first of them are.
        held_out: to choose by.
        **settings: of `train`.
    """
    count = min(max(len(batches) // _SHARE, _LEAST), _MOST, len(batches))
    start = HeldOut(trained, held_out)
    found: dict[float, float] = {}
    for factor in _FACTORS:
        tried = replace(recovery, lr=recovery.lr * factor, epochs=1)
        try:
            train(tried, trained, batches[:count], describe="Choosing a rate", **settings)
            found[tried.lr] = held_out_loss(trained, held_out)
        except NotFiniteError:
            found[tried.lr] = math.inf
        start.restore_()
    best = min(found, key=found.__getitem__)
    if found[best] == math.inf:
        tried_rates = ", ".join(f"{rate:g}" for rate in found)
        raise ValueError(
            f"the loss is not finite after short runs at the rates {tried_rates}. Load the "
            "model again, and give a lower lr."
        )
    return best


@dataclass(frozen=True)
class Training:
    """What a recovery trains on, and how.

    Attributes:
        batches: with labels.
        held_out: batches that show which weights were best; may be none.
        freeze: whether a mask keeps the zeros.
        grids: weights that stay on their grids.
        search: whether the rate is chosen by short runs first.
    """

    batches: Sequence[dict[str, Any]]
    held_out: Sequence[dict[str, Any]]
    freeze: bool
    grids: Sequence[Gridded]
    search: bool

    def of(self, recovery: Recovery, trained: nn.Module) -> tuple[Recovery, list[str]]:
        """Train what `recovery.prepared` gave.

        Returns:
            The recovery with the rate that it was trained at, and notes on how it went.

        Raises:
            ValueError: the loss is no longer finite.
        """
        settings: dict[str, Any] = {"freeze": self.freeze, "grids": self.grids}
        notes = []
        if self.search:
            rate = chosen_rate(recovery, trained, self.batches, self.held_out, **settings)
            recovery = replace(recovery, lr=rate)
            notes.append(f"learning rate {rate:g}, by the held-out loss after short runs")
        watch = HeldOut(trained, self.held_out) if self.held_out else None
        losses = train(recovery, trained, self.batches, watch=watch, **settings)
        told = f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end"
        if watch is not None:
            notes.append(
                f"loss on {len(self.held_out)} held-out batches: {watch.before:.3f}, recovered "
                f"{watch.best:.3f}"
            )
        return recovery, [told, *notes]
