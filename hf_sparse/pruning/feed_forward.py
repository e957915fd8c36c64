"""The feed-forward network of a block: finding it, and running it apart from the block.

Plain: `down(act(up(x)))`. Gated: `down(act(gate(x)) * up(x))`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_sparse.calibration.activations import Store
from hf_sparse.calibration.input_statistics import InputStatistics
from hf_sparse.calibration.recording import TokenMasks
from hf_sparse.structure.layers import TargetLayer

# Paths from a module to its gate (or None), up, down and activation.
_LAYOUTS = (
    ("gate_proj", "up_proj", "down_proj", "act_fn"),  # Llama, Mistral, Qwen, Gemma
    (None, "fc1", "fc2", "activation_fn"),  # OPT
    (None, "c_fc", "c_proj", "act"),  # GPT-2
    (None, "dense_h_to_4h", "dense_4h_to_h", "act"),  # GPT-NeoX
    (None, "intermediate.dense", "output.dense", "intermediate.intermediate_act_fn"),  # BERT
    (None, "ffn", "ffn_output", "activation"),  # ALBERT
)

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FeedForward:
    """The layers of a feed-forward network.

    Attributes:
        up: hidden to intermediate; of a gated network the part without activation.
        gate: hidden to intermediate, before the activation; None for a plain network.
        down: intermediate to hidden.
        activation: elementwise.
    """

    up: TargetLayer
    gate: TargetLayer | None
    down: TargetLayer
    activation: Activation

    @property
    def layers(self) -> list[TargetLayer]:
        """All of them, those that share their inputs first."""
        return [*self.entries, self.down]

    @property
    def entries(self) -> list[TargetLayer]:
        """Those that the network's inputs enter."""
        return [layer for layer in (self.gate, self.up) if layer is not None]

    def inner(self, inputs: Tensor) -> Tensor:
        """What enters `down`, `(tokens, intermediate)`, for `(tokens, hidden)`; no hook sees it."""
        up: Tensor = self.up.module.forward(inputs)
        if self.gate is None:
            return self.activation(up)
        return self.activation(self.gate.module.forward(inputs)) * up


def find_feed_forward(block: nn.Module, layers: Sequence[TargetLayer]) -> FeedForward | None:
    """The feed-forward network of a block, if all its layers are among `layers`; else None."""
    known = {id(layer.module): layer for layer in layers}
    for found in _candidates(block):
        gate, up, down = (None if m is None else known.get(id(m)) for m in found[:3])
        if up is not None and down is not None and (gate is not None or found[0] is None):
            return FeedForward(up, gate, down, found[3])
    return None


def _candidates(
    block: nn.Module,
) -> Iterator[tuple[nn.Module | None, nn.Module, nn.Module, Activation]]:
    for module in block.modules():
        for gate, up, down, activation in _LAYOUTS:
            parts = [None if path is None else _at(module, path) for path in (gate, up, down)]
            act = _at(module, activation)
            if parts[1] is None or parts[2] is None or act is None:
                continue
            if gate is None or parts[0] is not None:
                yield parts[0], parts[1], parts[2], act


def _at(module: nn.Module, path: str) -> nn.Module | None:
    found: object = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) or callable(found) else None  # type: ignore[return-value]


class Recorder:
    """An observer that keeps a network's inputs beside what `statistics` collects.

    Attributes:
        inputs: of each batch, those of tokens that count, `(tokens, hidden)`.
        fits: whether `FeedForward` describes what the block computes, seen on the first batch.
    """

    def __init__(self, network: FeedForward, statistics: InputStatistics, store: Store) -> None:
        self._network, self._statistics, self._store = network, statistics, store
        self._entered: Tensor | None = None
        self._masks = TokenMasks()
        self.inputs: list[Callable[[], Tensor]] = []
        self.fits = True

    def on_batch(self, masks: TokenMasks) -> None:
        self._masks = masks
        self._statistics.on_batch(masks)

    def end_call(self) -> None:
        self._statistics.end_call()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record while the block runs; it must be hooked before the statistics are."""
        hooks = [
            self._network.up.module.register_forward_pre_hook(self._enter),
            self._network.down.module.register_forward_pre_hook(self._inside),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._entered = None

    def _enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._entered = args[0]
        self.inputs.append(self._store(self._masks.counted(args[0])))

    def _inside(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(self.inputs) > 1 or self._entered is None:
            return
        given, inner = args[0], self._network.inner(self._entered)
        self.fits = inner.shape == given.shape and torch.allclose(
            inner, given, rtol=1e-2, atol=1e-3 * float(given.abs().max())
        )
