"""Which keys the queries of a program see: masks, and where the keys are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from hf_sparse.runtime.kernels.attention import UNSEEN
from hf_sparse.runtime.programs.cache import TileLayer
from hf_sparse.runtime.programs.key_tables import Tables, cache_tables, table_addresses
from hf_sparse.runtime.weights.memory import aligned


class SeenKeys:
    """The keys of each sequence in each block, and which of them are seen.

    Args:
        blocks, batch: how many.
        capacity: tokens for which there is room, a multiple of `width`.
        width: tokens of a key tile.

    Attributes:
        masks: `(batch, capacity)`, added to the scores of keys.
        tables: `(blocks, batch, capacity / width, 3)`, the key tiles of a cache; a program without one
            puts those of its input there.
        at: where each table begins.
    """

    def __init__(self, blocks: int, batch: int, capacity: int, width: int) -> None:
        self.masks = aligned(batch, capacity)
        self._masked = False
        self._filled: tuple[object, ...] = ()
        self.use(cache_tables(blocks, batch, capacity // width, width))

    @property
    def nbytes(self) -> int:
        """Bytes of masks and tables."""
        return int(self.masks.nbytes + self.tables.nbytes)

    @property
    def memory(self) -> list[object]:
        """The mask of each sequence, and the tables."""
        return [list(self.masks), self.tables]

    def use(self, tables: Tables) -> None:
        """Take other tables."""
        self.tables, self.at = tables, table_addresses(tables)

    def see(self, mask: Tensor | None) -> None:
        """Let queries see the keys for which a mask `(batch, tokens)` is true; None for all."""
        if mask is None:
            if self._masked:
                self.masks.zero_()
            self._masked = False
        else:
            self._masked = True
            self.masks[:, : mask.shape[1]].copy_(mask == 0).mul_(UNSEEN)

    def find(self, layers: Sequence[TileLayer]) -> None:
        """Write the addresses of a cache's tiles, unless they are there."""
        places = tuple((layer.tiles.data_ptr(), layer.tiles.shape) for layer in layers)
        if places == self._filled:
            return
        self._filled = places
        batch, entries, _, width = layers[0].tiles.shape
        entries = min(entries, self.tables.shape[2])
        for table, layer in zip(self.tables, layers, strict=True):
            starts = layer.tiles.data_ptr() + np.arange(batch) * (4 * layer.tiles.stride(0))
            table[:, :entries, 0] = starts[:, None] + np.arange(entries) * (4 * layer.rows * width)
