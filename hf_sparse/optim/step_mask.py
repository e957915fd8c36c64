"""Keeping zeros over one step of an optimizer: the mechanism behind every way to freeze them.

After the step, whatever the optimizer has done (weight decay, momentum, an update that mixes rows),

    w <- m * w,    m = [w was not zero before the step]

and a kept weight that has landed on exactly zero becomes the least normal number of its type instead.
So the fate of a weight is the same everywhere: a zero stays zero; a weight that was kept stays kept,
and may move away from zero again. The zeros of the weights are the mask at all times: it is read from
them before each step, and a checkpoint of the model is all that resuming needs. (With a mask kept from
the start, a checkpoint could not tell which of its zeros belong to it, and weights that are loaded
later would be cut by the mask of others.)

Only weights are masked, not gradients: their norm, by which they are clipped, counts the pruned
weights too, and so do the moments that an optimizer keeps of them, without effect on others.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_sparse.optim.sharding import local_part
from hf_sparse.optim.zeros import refill_, unlike

# Weights that are masked together: few enough for their temporaries to stay in the cache.
_CHUNK = 1 << 18


class StepMask:
    """Which weights of some parameters are not zero, from before a step until after it.

    Memory: one byte for each weight.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def remember(self, key: int, parameter: Tensor) -> None:
        """Before a step: note what is not zero.

        Args:
            key: tells the parameter from the others.
            parameter: of this process a shard may be enough.
        """
        weight = _values(parameter)
        if key not in self._kept:
            self._kept[key] = torch.empty_like(weight, dtype=torch.uint8)
        for part, kept in _parts(weight, self._kept[key]):
            kept.copy_(unlike(part))  # twice as fast as a comparison into bytes

    @torch.no_grad()
    def restore_(self, key: int, parameter: Tensor) -> None:
        """After a step: make the same weights zero as before it, and no others."""
        for part, kept in _parts(_values(parameter), self._kept[key]):
            refill_(part, kept.to(part.dtype))


def _values(parameter: Tensor) -> Tensor:
    """The values that this process holds; a scalar as a vector."""
    values: Tensor = torch.atleast_1d(local_part(parameter.detach()))
    return values


def _parts(weight: Tensor, kept: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a weight and its mask into some rows each; on a GPU they stay whole."""
    rows = len(weight) if weight.is_cuda else _CHUNK // max(weight.shape[1:].numel(), 1)
    rows = max(rows, 1)
    return zip(weight.split(rows), kept.split(rows), strict=True)
