"""How much a model uses each feature of its residual stream, seen at its norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from hf_sparse.calibration.calling import run_on
from hf_sparse.calibration.recording import TokenMasks, token_masks
from hf_sparse.structure.layers import TargetLayer
from hf_sparse.structure.norms import Norm


class HiddenUse:
    """What passes through norms and heads, over all tokens but padding.

    Attributes:
        norms: over hidden features.
        activation: for each norm, the mean of the absolute outputs, fp64 `(hidden,)`.
        shares: for each norm, the mean over tokens of x ** 2 / mean(x ** 2), where x is what enters it,
            without its mean if the norm takes that away; fp64 `(hidden,)`.
        heads: for each block, the mean norm of what each head gives, fp64 `(heads,)`.
    """

    def __init__(
        self, norms: Sequence[Norm], outs: Sequence[TargetLayer], head_dim: int, size: int
    ) -> None:
        self.norms, self._outs, self._head_dim = norms, outs, head_dim
        self._masks = TokenMasks()
        self._sums = [torch.zeros(2, size, dtype=torch.float64) for _ in norms]
        self._tokens = [0] * len(norms)
        self._heads: list[Any] = [0.0] * len(outs)

    @property
    def activation(self) -> list[Tensor]:
        pairs = zip(self._sums, self._tokens, strict=True)
        return [sums[0] / max(tokens, 1) for sums, tokens in pairs]

    @property
    def shares(self) -> list[Tensor]:
        pairs = zip(self._sums, self._tokens, strict=True)
        return [sums[1] / max(tokens, 1) for sums, tokens in pairs]

    @property
    def heads(self) -> list[Tensor]:
        return self._heads

    @torch.no_grad()
    def watch(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
        """Run the model over all data."""
        with ExitStack() as undo:
            for number, norm in enumerate(self.norms):

                def see(module: nn.Module, args: Any, output: Any, number: int = number) -> None:
                    self._see(number, args[0], output)

                undo.callback(norm.module.register_forward_hook(see).remove)
            for number, layer in enumerate(self._outs):

                def look(module: nn.Module, args: Any, number: int = number) -> None:
                    given = self._masks.counted(args[0]).float()
                    norms = given.view(len(given), -1, self._head_dim).norm(dim=2)
                    self._heads[number] = self._heads[number] + norms.double().sum(dim=0).cpu()

                undo.callback(layer.module.register_forward_pre_hook(look).remove)
            for batch in tqdm(batches, desc="Watching hidden features"):
                self._masks = token_masks(batch)
                run_on(model, {name: value for name, value in batch.items() if name != "labels"})

    def _see(self, number: int, given: Tensor, output: Tensor) -> None:
        entered, left = (self._masks.counted(tensor).float() for tensor in (given, output))
        if self.norms[number].centred:
            entered = entered - entered.mean(dim=1, keepdim=True)
        squares = entered.square()
        mean = squares.mean(dim=1, keepdim=True)
        shares = squares / torch.where(mean > 0, mean, 1.0)
        self._sums[number] += torch.stack([left.abs(), shares]).double().sum(dim=1).cpu()
        self._tokens[number] += len(entered)
