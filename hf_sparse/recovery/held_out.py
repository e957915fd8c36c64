"""Held-out batches of a training: their loss, the best weights so far, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_sparse.calibration.losses import check_finite, fast_autocast, mean_loss


def held_out_loss(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> float:
    """The mean loss over batches, with products as in training; nan without any.

    Raises:
        NotFiniteError: it is infinite or no number.
    """
    with fast_autocast(model):
        loss = mean_loss(model, batches)
    if batches:
        check_finite(model, loss)
    return loss


class HeldOut:
    """Looks at held-out batches while a model is trained, and keeps the weights that were best.

    Args:
        model: the model in training.
        batches: that it is not trained on.
        patience: looks in a row without a better loss after which training stops.

    Memory: the weights that are trained, once more.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Mapping[str, Any]], patience: int = 2
    ) -> None:
        self._model, self._batches, self._patience = model, batches, patience
        self._weights = [p for p in model.parameters() if p.requires_grad]
        self.before = self.best = held_out_loss(model, batches)
        self._kept = [weight.detach().clone() for weight in self._weights]
        self._worse = 0

    def look(self) -> bool:
        """Measure the loss now, and keep the weights if it is the least.

        Returns:
            Whether training should stop.
        """
        loss = held_out_loss(self._model, self._batches)
        if loss < self.best:
            self.best, self._worse = loss, 0
            for kept, weight in zip(self._kept, self._weights, strict=True):
                kept.copy_(weight.detach())
            return False
        self._worse += 1
        return self._worse >= self._patience

    @torch.no_grad()
    def restore_(self) -> None:
        """Give the model the weights that were best."""
        for kept, weight in zip(self._kept, self._weights, strict=True):
            weight.copy_(kept)
