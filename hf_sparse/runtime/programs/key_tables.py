"""Tables of key tiles, by which attention finds keys and values: an address and two strides each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Tables = NDArray[np.int64]


def cache_tables(blocks: int, batch: int, entries: int, width: int) -> Tables:
    """Tables of a cache's key tiles, `(blocks, batch, entries, 3)`; addresses come with the cache."""
    tables = np.zeros((blocks, batch, entries, 3), np.int64)
    tables[..., 1], tables[..., 2] = 4 * width, width
    return tables


def tile_tables(addresses: Sequence[Sequence[int]], widths: Sequence[int]) -> Tables:
    """Tables of the tiles of an input itself, `(buffers, tiles, 3)`.

    Args:
        addresses: of each tile, in each of the buffers that take turns.
        widths: of the tiles.
    """
    tables = np.zeros((len(addresses), len(widths), 3), np.int64)
    tables[..., 0], tables[..., 2] = addresses, widths
    tables[..., 1] = 4 * tables[..., 2]
    return tables


def table_addresses(tables: Tables) -> list[list[int]]:
    """Where each table `[i, j]` begins; of tiles' tables, where tile j's entry does."""
    first, second = tables.strides[:2]
    rows, columns = (np.arange(count) for count in tables.shape[:2])
    found: list[list[int]] = (
        tables.ctypes.data + first * rows[:, None] + second * columns
    ).tolist()
    return found
