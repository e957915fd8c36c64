"""Which weights become codes of few bits: those that a caller asks for, or that a config promises."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_sparse.quantization import Grid
from hf_sparse.runtime.weights.rounding import Coding
from hf_sparse.structure.layers import promised_config
from hf_sparse.structure.targets import Targets

# The grid to which weights are rounded where they are packed. Scales for 64 inputs of 8 bits are 3 % of
# the bytes, those for 32 of 4 bits 11 %. An output head always has 8 bits.
GRIDS = {8: Grid(8, 64), 4: Grid(4, 32)}


@dataclass(frozen=True)
class ModelCoding:
    """How the weights of a model become codes.

    Attributes:
        blocks, head: of the blocks' layers, and of the output head; None: not at all.
        only: the parameters of blocks that do, by identity; None: all.
    """

    blocks: Coding | None = None
    head: Coding | None = None
    only: frozenset[int] | None = None


def coding_of(model: nn.Module, bits: int | None) -> ModelCoding:
    """How a model's weights become codes.

    Args:
        model: its config, or how it was quantised, may promise a grid: then its codes are taken.
        bits: 8 or 4: round what is on no grid; None: leave it as it is.

    Raises:
        ValueError: there are no grids of so many bits, or the model is on a grid of others.
    """
    if bits is not None and bits not in GRIDS:
        raise ValueError(f"bits is {bits}; wanted 8 or 4, or None for weights as they are.")
    rounded = None if bits is None else Coding(GRIDS[8])
    promised = promised_config(model)
    if promised is None or promised.grid is None:
        return ModelCoding(None if bits is None else Coding(GRIDS[bits]), rounded)
    if bits not in (None, promised.bits):
        raise ValueError(
            f"bits is {bits}, and the weights of this {type(model).__name__} have {promised.bits} "
            f"already ({promised.grid}). Leave `bits` out: their codes are used as they are."
        )
    own = frozenset(id(layer.parameter) for layer in Targets.of(model, promised).layers)
    grid = promised.embedding_grid
    return ModelCoding(
        Coding(promised.grid, exact=True), rounded if grid is None else Coding(grid, True), own
    )
