"""Attention of a tile of queries as operations: the kernel for plain scores, or that for others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_sparse.runtime.kernels import attention, scored_attention
from hf_sparse.runtime.kernels.call import Argument, Operation
from hf_sparse.runtime.programs.step import Attend
from hf_sparse.runtime.programs.tiling import Tile

# A position that no query is before, for attention that is not causal.
_EVERYWHERE = 1 << 29


@dataclass(frozen=True)
class Attending:
    """The keys that a tile's queries see.

    Attributes:
        table, key_tiles: of the key tiles.
        key_count: keys in them.
        first_query: position of the tile's first query.
        k_first: row of the first head's keys in a key tile; the values lie behind the keys.
        mask: added to the scores of keys.
        biases: `(heads, distances)`, as `TileProgram`'s.
    """

    table: int
    key_tiles: int
    key_count: Argument
    first_query: Argument
    k_first: int
    mask: int
    biases: Tensor

    def operations(self, step: Attend, tile: Tile, q: int, out: int) -> list[Operation]:
        """Attend from the queries at `q` to the result at `out`."""
        if step.plain:
            return [self._plain(step, tile, q, out)]
        return [self._scored(step, tile, q, out, head) for head in range(step.heads.queries)]

    def _plain(self, step: Attend, tile: Tile, q: int, out: int) -> Operation:
        return attention.SIGNATURE.operation(
            attention.name(tile.vectors),
            heads=step.heads.queries,
            group=step.heads.group,
            **self._seen(step, q, out, self.k_first),
            first_query=self.first_query if step.causal else _EVERYWHERE,
        )

    def _scored(self, step: Attend, tile: Tile, q: int, out: int, head: int) -> Operation:
        heads = step.heads
        offset = 4 * tile.width * heads.dim * head
        k_first = self.k_first + head // heads.group * heads.dim
        bias = 0
        if step.biased:
            bias = self.biases[head].data_ptr() + 4 * (self.biases.shape[1] // 2)
        return scored_attention.SIGNATURE.operation(
            scored_attention.name(tile.vectors),
            **self._seen(step, q + offset, out + offset, k_first),
            first_query=self.first_query,
            ahead=step.ahead,
            cap=step.softcap,
            bias=bias,
        )

    def _seen(self, step: Attend, q: int, out: int, k_first: int) -> dict[str, Argument]:
        """What both kernels are told: of queries, keys and values, and which keys are seen."""
        heads = step.heads
        return {
            "q": q,
            "out": out,
            "head_dim": heads.dim,
            "k_first": k_first,
            "v_first": k_first + heads.key_rows,
            "table": self.table,
            "key_tiles": self.key_tiles,
            "mask": self.mask,
            "key_count": self.key_count,
            "window": step.window,
            "scale": step.scale,
        }
