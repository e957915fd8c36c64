"""What is added to scores by distance, as kernels read it: a float for each distance that there is."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.runtime.weights.memory import aligned
from hf_sparse.runtime.weights.stack import Stack


def unrolled(distances: Tensor, reach: int, *, behind: bool) -> Tensor:
    """The biases `(heads, 2 * reach)` of distances from `-reach` to `reach - 1`.

    Args:
        distances: `Block.distances`.
        reach: the furthest.
        behind: distances tell how far a query is behind a key, else how far a key is behind a query.
    """
    furthest = distances.shape[1] // 2
    places = torch.arange(-reach, reach).clamp(-furthest, furthest)
    found = aligned(len(distances), 2 * reach)
    return found.copy_(distances[:, furthest + (places if behind else -places)])


def biases_of(stack: Stack, reach: int, *, behind: bool) -> list[Tensor]:
    """The biases of each block, as `unrolled`; blocks that share distances share them.

    Where a call brings the biases, it is one memory for all blocks, still zeros; without any, memory
    of no heads.
    """
    if not stack.biased or stack.blocks[0].distances is None:
        empty = aligned(stack.heads if stack.biased else 0, 2 * reach)
        return [empty] * len(stack.blocks)
    made: dict[int, Tensor] = {}
    for block in stack.blocks:
        distances = block.distances
        assert distances is not None
        if id(distances) not in made:
            made[id(distances)] = unrolled(distances, reach, behind=behind)
    return [made[id(block.distances)] for block in stack.blocks]


def nbytes_of(biases: list[Tensor]) -> int:
    """Bytes of biases, shared ones once."""
    return sum({id(one): one.nbytes for one in biases}.values())
