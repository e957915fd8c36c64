"""Which heads and neurons of each block matter least, and a model that does without them for a while.

    score of a neuron = ||its activations||_2

as in Sandri et al., "2SSP", https://arxiv.org/abs/2501.17771 (which takes the mean over sequences), and

    score of a column behind attention = ||column||_2 * ||what enters it||_2

whose squares are summed over a head of keys with all its heads of queries: Wanda's score (Sun et al.,
https://arxiv.org/abs/2306.11695) of whole units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.calibration.sensitivity import input_norms
from hf_sparse.structure.parts import BlockSize
from hf_sparse.structure.units import BlockUnits


@dataclass(frozen=True)
class Ranking:
    """The units of each block, those first that matter most.

    Attributes:
        groups: of each block, heads of keys, `(key_heads,)`.
        neurons: of each block, `(neurons,)`.
        queries: heads of queries for each head of keys.
    """

    groups: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]
    queries: int

    @classmethod
    def of(
        cls, model: nn.Module, blocks: Sequence[BlockUnits], batches: Sequence[Mapping[str, Any]]
    ) -> Ranking:
        """Rank the units of blocks of one size by what they give on calibration data."""
        layers = [layer for units in blocks for layer in (units.out, units.down)]
        norms = input_norms(model, layers, batches)
        groups, neurons = [], []
        for units in blocks:
            columns = units.out.weight.float().square().sum(dim=0) * norms[units.out.name].square()
            heads = columns.view(units.size.key_heads, -1).sum(dim=1)
            groups.append(heads.argsort(descending=True, stable=True).cpu())
            own = norms[units.down.name]
            neurons.append(own.argsort(descending=True, stable=True).cpu())
        size = blocks[0].size
        return cls(tuple(groups), tuple(neurons), size.heads // size.key_heads)

    def kept(self, block: int, size: BlockSize) -> tuple[Tensor, Tensor, Tensor]:
        """The numbers of the heads, heads of keys and neurons of a block that stay, ascending."""
        groups = self.groups[block][: size.key_heads].sort().values
        heads = (groups[:, None] * self.queries + torch.arange(self.queries)).flatten()
        return heads, groups, self.neurons[block][: size.neurons].sort().values


@contextmanager
def without_units(
    blocks: Sequence[BlockUnits], ranking: Ranking, size: BlockSize
) -> Iterator[None]:
    """Let blocks compute what they would with as many units: inputs of the layers behind are zeroed."""
    with ExitStack() as undo:
        for number, units in enumerate(blocks):
            heads, _, neurons = ranking.kept(number, size)
            for layer, kept in ((units.out, units.features(heads)), (units.down, neurons)):
                width = layer.weight.shape[1]
                if len(kept) == width:
                    continue
                mask = torch.zeros(width, device=layer.weight.device, dtype=layer.weight.dtype)
                mask[kept.to(mask.device)] = 1

                def cut(module: nn.Module, args: Any, mask: Tensor = mask) -> Any:
                    return (args[0] * mask, *args[1:])

                hook = layer.module.register_forward_pre_hook(cut)
                undo.callback(hook.remove)
        yield
