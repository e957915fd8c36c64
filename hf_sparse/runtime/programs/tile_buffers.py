"""The memory of a program for many tokens."""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import accumulate

from torch import Tensor

from hf_sparse.runtime.programs.dependences import apart, needed_behind
from hf_sparse.runtime.programs.step import Experts, FeedForward, Uses
from hf_sparse.runtime.programs.tiling import Tile
from hf_sparse.runtime.weights.memory import aligned
from hf_sparse.runtime.weights.panels import CHUNK_ROWS

# Buffers that others read take turns: one block's are still read when the next one's are written.
TURNS = 2


class TileBuffers:
    """Memory for every buffer of the steps, by where it is needed.

    What is read behind a wait has room for every tile. Anything else lasts while a thread works on
    one tile: it is the thread's own, so that it stays in its cache, and buffers that never hold
    something at the same time share it. Of intermediate features there is room for a chunk.

    Args:
        sections: the steps between two waits.
        lists: the tiles of each thread.
        widest: tokens of the widest tile.
        turns: names of the buffers that other threads read.
    """

    def __init__(
        self,
        sections: Sequence[Sequence[Uses]],
        lists: Sequence[Sequence[Tile]],
        widest: int,
        turns: Set[str],
    ) -> None:
        steps = [step for section in sections for step in section]
        self._lists, self._widest = lists, widest
        self._features: dict[str, int] = {}
        for step in steps:
            for buffer in (*step.reads, *step.writes):
                most = max(self._features.get(buffer.name, 0), buffer.features)
                self._features[buffer.name] = most
        # One tensor for each tile, or for each thread.
        self.memory: list[Tensor] = []
        # For each turn and tile: the address of each buffer.
        self._at: list[dict[Tile, dict[str, int]]] = [
            {tile: {} for part in lists for tile in part} for _ in range(TURNS)
        ]
        lasting = _read_behind_waits(sections)
        chunked = {
            buffer.name
            for step in steps
            if isinstance(step, FeedForward | Experts)
            for buffer in step.inner
        }
        for name in self._features:
            if name in lasting:
                self._reserve_tiles(name, TURNS if name in turns else 1)
            elif name in chunked:
                self._reserve_scratch([name], CHUNK_ROWS)
        own = [name for name in self._features if name not in lasting | chunked]
        for group in _groups(own, apart(steps)):
            self._reserve_scratch(group, max(self._features[name] for name in group))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(memory.nbytes for memory in self.memory)

    def of(self, tile: Tile, index: int) -> dict[str, int]:
        """The address of each buffer, by its name, for a tile in block `index`."""
        return self._at[index % TURNS][tile]

    def _reserve_tiles(self, name: str, turns: int) -> None:
        """Room for every tile, in the order of the tokens."""
        tiles = sorted(self._at[0], key=lambda tile: (tile.sequence, tile.start))
        ends = list(accumulate(tile.width for tile in tiles))
        features = self._features[name]
        for turn in range(turns):
            memory = aligned(ends[-1], features)
            for tile, end in zip(tiles, ends, strict=True):
                self.memory.append(memory[end - tile.width : end])
                place = memory.data_ptr() + 4 * features * (end - tile.width)
                for at in self._at if turns == 1 else [self._at[turn]]:
                    at[tile][name] = place

    def _reserve_scratch(self, names: Sequence[str], features: int) -> None:
        """Room for one tile of each thread, which some buffers share."""
        memory = aligned(len(self._lists), features, self._widest)
        self.memory += list(memory)
        for part, own in zip(self._lists, memory, strict=True):
            for tile in part:
                for at in self._at:
                    at[tile] |= dict.fromkeys(names, own.data_ptr())


def _read_behind_waits(sections: Sequence[Sequence[Uses]]) -> set[str]:
    """The names of the buffers that are written before a wait, and read behind it."""
    needed = iter(needed_behind([step for section in sections for step in section]))
    lasts = [[next(needed) for _ in section][-1] for section in sections]
    return set().union(*lasts)


def _groups(names: Sequence[str], pairs: Set[tuple[str, str]]) -> list[list[str]]:
    """Names in groups, none of which has both of a pair."""
    found: list[list[str]] = []
    for name in names:
        for group in found:
            if not any((name, other) in pairs for other in group):
                group.append(name)
                break
        else:
            found.append([name])
    return found
