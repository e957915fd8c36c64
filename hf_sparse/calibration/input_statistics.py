"""What layers see on the calibration data: norms of their inputs, or Gram matrices.

Layers that are given the same tensor (query, key and value) share one statistic: they are one
`Problem` for a solver, which factorises its matrix once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from hf_sparse.calibration.layer_inputs import watching
from hf_sparse.calibration.linalg import add_gram_, mirror_
from hf_sparse.calibration.processes import is_shared, summed
from hf_sparse.calibration.recording import TokenMasks
from hf_sparse.calibration.token_weights import WeightedTokens
from hf_sparse.calibration.walk import EnoughSeen
from hf_sparse.structure.layers import TargetLayer

# The sums of the layers of a block that are seen in one pass take so many bytes, if experts are among
# them: a mixture has hundreds, and each has Gram matrices of its own.
LARGEST_SUMS = 1 << 30


@dataclass(frozen=True)
class Seen:
    """What a group of layers that share their inputs saw.

    Attributes:
        layers: in the order of the model.
        statistic: of `Norms` or `Grams`.
        tokens: how many inputs it sums up.
    """

    layers: tuple[TargetLayer, ...]
    statistic: Tensor
    tokens: int

    def is_of(self, layers: Sequence[TargetLayer]) -> bool:
        """Whether exactly these layers, in any order, shared the inputs."""
        return {layer.name for layer in self.layers} == {layer.name for layer in layers}


class InputStatistics(ABC):
    """Sums something over the inputs of layers while data runs through them.

    Args:
        accelerator: its processes add up what they saw.
        weights: of the tokens; None: all count alike.

    Memory: one sum per group of layers, and the inputs of a block's layers for one batch.
    """

    def __init__(self, accelerator: Any = None, weights: WeightedTokens | None = None) -> None:
        self._accelerator = accelerator
        self._weights = weights
        self._masks = TokenMasks()
        self._layers: Sequence[TargetLayer] = ()
        self._leaders: dict[str, str] = {}  # the layer whose inputs a layer shares; itself if none
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._now: dict[str, object] = {}  # inputs of the call of the block that runs
        self._called: set[str] = set()  # the layers that were given inputs since `_now` was empty
        self._calls: dict[str, int] = {}
        self._runs_once = False

    def passes(
        self, layers: Sequence[TargetLayer], limit: int = LARGEST_SUMS
    ) -> list[list[TargetLayer]]:
        """Cut layers into parts that are to be seen in one pass over the data each.

        The first part has all layers but experts. Experts are added to it, and to further parts, while
        the sums of a part take at most `limit` bytes; both matrices of an expert follow each other.
        """
        parts = [[layer for layer in layers if layer.stack is None]]
        used = sum(self.size(layer) for layer in parts[0])
        experts = [layer for layer in layers if layer.stack is not None]
        first: dict[int, int] = {}
        for number, layer in enumerate(experts):
            first.setdefault(id(layer.module), number)
        for layer in sorted(experts, key=lambda one: (first[id(one.module)], one.expert)):
            size = self.size(layer)
            if parts[-1] and used + size > limit:
                parts.append([])
                used = 0
            parts[-1].append(layer)
            used += size
        return parts

    @abstractmethod
    def size(self, layer: TargetLayer) -> int:
        """The bytes of the sum for a layer, if it shares its inputs with no other."""

    def on_batch(self, masks: TokenMasks) -> None:
        """Which tokens of the next inputs count."""
        self._masks = masks

    @contextmanager
    def collecting(self, layers: Sequence[TargetLayer], *, stop: bool = False) -> Iterator[None]:
        """Collect the inputs of `layers`, and of no others, while the block runs.

        Args:
            layers: of one block, or outside the blocks.
            stop: end each call of the block when every layer has been seen, so that what follows
                the last layer's input is not computed (once the first batch has shown that no
                layer is called twice).
        """
        self._layers = layers
        self._leaders, self._sums, self._tokens = {}, {}, {}
        self._now, self._called = {}, set()
        self._calls = dict.fromkeys((layer.name for layer in layers), 0)
        self._runs_once = False
        if self._weights is not None:
            self._weights.restart()
        try:
            with watching(layers, lambda: self._masks, partial(self._see, stop)):
                yield
        finally:
            self._now = {}

    def end_call(self) -> None:
        """A call of the block, or of the model, is over."""
        self._runs_once = all(count == 1 for count in self._calls.values())
        self._calls = dict.fromkeys(self._calls, 0)
        self._now, self._called = {}, set()

    def groups(self) -> list[Seen]:
        """The groups of layers that shared their inputs, with their sums; forgets them.

        A layer that no token reached has a sum of zeros and 0 tokens.

        Raises:
            ValueError: inputs were not finite; the message names the layer.
        """
        if is_shared(self._accelerator):
            self._agree()
        found: dict[str, list[TargetLayer]] = {}
        for layer in self._layers:
            found.setdefault(self._leaders.get(layer.name, layer.name), []).append(layer)
        seen = []
        for leader, layers in found.items():
            total = self._sums.pop(leader, None)
            if total is None:
                total = self._new(layers[0].weight)
            tokens = torch.tensor(self._tokens.get(leader, 0), device=total.device)
            total = self._finished(summed(total, self._accelerator))
            if not torch.isfinite(total).all():
                raise ValueError(
                    f"the inputs of {layers[0].name} are not finite on the calibration data. Load "
                    "the model in float32 or bfloat16, and check the data."
                )
            seen.append(Seen(tuple(layers), total, int(summed(tokens, self._accelerator))))
        return seen

    def _agree(self) -> None:
        """Take over from the other processes which layers share inputs: some saw none of some."""
        for leaders in gather_object([self._leaders]):
            for name, leader in leaders.items():
                if self._leaders.setdefault(name, leader) != leader:
                    raise ValueError(_inconsistent(name, leader))

    def _see(self, stop: bool, name: str, given: object, inputs: Callable[[], Tensor]) -> None:
        if name in self._called:
            self._now, self._called = {}, set()  # called again, on what others may not have seen
        self._called.add(name)
        self._calls[name] += 1
        leader = self._leaders.get(name) or next(
            (other for other, known in self._now.items() if known is given), name
        )
        self._leaders[name] = leader
        if leader != name:
            if self._now.get(leader) is not given:
                raise ValueError(_inconsistent(name, leader))
        else:
            self._now[name] = given
            self._add(name, inputs())
        if stop and self._runs_once and all(self._calls.values()):
            raise EnoughSeen

    def _add(self, name: str, inputs: Tensor) -> None:
        self._tokens[name] = self._tokens.get(name, 0) + len(inputs)
        if name not in self._sums:
            self._sums[name] = self._new(inputs)
        if self._weights is not None:
            inputs = self._weights.weighted(name, inputs)
        self._accumulate(self._sums[name], inputs)

    @abstractmethod
    def _new(self, inputs: Tensor) -> Tensor:
        """An empty sum for inputs `(tokens, in_features)`."""

    @abstractmethod
    def _accumulate(self, total: Tensor, inputs: Tensor) -> None:
        """Add inputs `(tokens, in_features)` to a sum."""

    def _finished(self, total: Tensor) -> Tensor:
        return total


def _inconsistent(name: str, leader: str) -> str:
    return (
        f"{name} and {leader} share their inputs on some calibration batches and not on others, so "
        "their statistics cannot be collected. Use method='magnitude'."
    )


class Norms(InputStatistics):
    """L2 norm of each input feature over all tokens, `(in_features,)`, summed in fp64."""

    def _new(self, inputs: Tensor) -> Tensor:
        return torch.zeros(inputs.shape[-1], dtype=torch.float64, device=inputs.device)

    def size(self, layer: TargetLayer) -> int:
        return 8 * layer.weight.shape[1]

    def _accumulate(self, total: Tensor, inputs: Tensor) -> None:
        total += torch.linalg.vector_norm(inputs.float(), dim=0).double().square()

    def _finished(self, total: Tensor) -> Tensor:
        return total.sqrt()


class Grams(InputStatistics):
    """Gram matrix of the inputs over all tokens, `(in_features, in_features)`, fp32; summed in fp64."""

    def _new(self, inputs: Tensor) -> Tensor:
        features = inputs.shape[-1]
        return torch.zeros(features, features, dtype=torch.float64, device=inputs.device)

    def size(self, layer: TargetLayer) -> int:
        return 8 * layer.weight.shape[1] ** 2

    def _accumulate(self, total: Tensor, inputs: Tensor) -> None:
        add_gram_(total, inputs)

    def _finished(self, total: Tensor) -> Tensor:
        return mirror_(total.float())
