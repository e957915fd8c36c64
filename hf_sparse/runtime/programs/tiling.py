"""Which tokens make a tile, and which thread has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The time of a tile of 4, 2, 1 vectors, relative: narrow tiles read the same weights for less.
_COST = {4: 1.0, 2: 0.6, 1: 0.45}


@dataclass(frozen=True)
class Tile:
    """`tokens` tokens of sequence `sequence` from `start` on, in rows of `width` floats."""

    sequence: int
    start: int
    tokens: int
    width: int
    lanes: int

    @property
    def vectors(self) -> int:
        """Vectors in a row."""
        return self.width // self.lanes

    @property
    def cost(self) -> float:
        """Relative time."""
        return _COST[self.vectors]

    def halves(self) -> tuple[Tile, Tile]:
        """The same tokens in two tiles of half the width."""
        half = self.width // 2
        first = min(self.tokens, half)
        rest = self.tokens - first
        return (
            Tile(self.sequence, self.start, first, half, self.lanes),
            Tile(self.sequence, self.start + first, rest, half, self.lanes),
        )


def cut(sequence: int, tokens: int, widths: Sequence[int]) -> list[Tile]:
    """Cut one sequence: the widest tiles, then the narrower ones that hold what is left."""
    lanes = widths[-1]
    tiles: list[Tile] = []
    start = 0
    while start < tokens:
        left = tokens - start
        # A wider tile with empty columns is faster than two narrow ones.
        width = next((w for w in reversed(widths) if w >= left), widths[0])
        tiles.append(Tile(sequence, start, min(left, width), width, lanes))
        start += width
    return tiles


def share(tiles: list[Tile], threads: int) -> list[list[Tile]]:
    """Divide tiles among threads in order, about equal in time; some are halved where that helps.

    Args:
        tiles: of all sequences, in order.
        threads: lists to make.

    Returns:
        A list per thread, possibly empty.
    """
    best = _divide(tiles, threads)
    while True:
        splittable = [tile for tile in tiles if tile.vectors > 1 and tile.tokens > tile.width // 2]
        if not splittable:
            return best
        chosen = max(splittable, key=lambda tile: tile.cost)
        where = tiles.index(chosen)
        tiles = [*tiles[:where], *chosen.halves(), *tiles[where + 1 :]]
        divided = _divide(tiles, threads)
        if _time(divided) < 0.98 * _time(best):
            best = divided
        elif len(tiles) >= threads:  # with fewer, the time only falls when all long ones are halved
            return best


def _time(lists: list[list[Tile]]) -> float:
    return max(sum(tile.cost for tile in part) for part in lists)


def _divide(tiles: list[Tile], threads: int) -> list[list[Tile]]:
    """Contiguous where that is even: neighbours in a sequence share keys; else longest first."""
    lists: list[list[Tile]] = [[] for _ in range(threads)]
    times = [0.0] * threads
    for tile in sorted(tiles, key=lambda tile: -tile.cost):
        least = times.index(min(times))
        lists[least].append(tile)
        times[least] += tile.cost
    order = {tile: number for number, tile in enumerate(tiles)}
    total = sum(times)
    straight: list[list[Tile]] = [[] for _ in range(threads)]
    done = 0.0
    for tile in tiles:
        straight[min(int((done + tile.cost / 2) / total * threads), threads - 1)].append(tile)
        done += tile.cost
    if _time(straight) <= 1.02 * max(times):
        return straight
    return [sorted(part, key=order.__getitem__) for part in lists]
