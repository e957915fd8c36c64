"""How far kernels of attention reach into tables of key tiles, into the tiles, and into masks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_sparse.runtime.kernels.extents import Call, Extent, rounded_up, strided

# Bytes of a table's entry for a key tile: address, bytes of a row, tokens.
ENTRY = 24


def _tile(call: Call, number: int, rows: int, floats: int) -> Iterator[Extent]:
    """The rows of keys and values in one tile, `floats` of each."""
    address, stride = call.array("table", np.int64, 2, at=ENTRY * number).tolist()
    for first in ("k_first", "v_first"):
        place = address + call[first] * stride
        yield Extent("keys", place, strided(rows, stride, 4 * floats), False)


def tile_attention(call: Call, rows: int, keys: int, widest: int) -> Iterator[Extent]:
    """Of a tile of queries: all key tiles up to the last key.

    Args:
        call: has table, key_tiles, key_count, k_first, v_first and mask.
        rows: features of keys, and of values, that are read.
        keys: that are taken at once.
        widest: tokens of the widest tile, for which the kernel has room.
    """
    done = end = 0
    for number in range(call["key_tiles"]):
        if done >= call["key_count"]:
            break
        yield call.reads("table", ENTRY, at=ENTRY * number)
        tokens = int(call.array("table", np.int64, 3, at=ENTRY * number)[2])
        call.wants(0 < tokens <= widest, f"1 to {widest} tokens in key tile {number}, not {tokens}")
        wanted = rounded_up(min(tokens, call["key_count"] - done), keys)
        yield from _tile(call, number, rows, wanted)
        end = done + wanted
        done += tokens
    yield call.reads("mask", 4 * end)


def row_attention(call: Call, rows: int, lanes: int) -> Iterator[Extent]:
    """Of one query: whole tiles, as many as the keys need."""
    call.wants(call["width"] > 0, "a width of key tiles")
    tiles = rounded_up(call["key_count"], call["width"]) // call["width"]
    floats = rounded_up(call["width"], lanes)
    for number in range(tiles):
        yield call.reads("table", 16, at=ENTRY * number)
        yield from _tile(call, number, rows, floats)
    yield call.reads("mask", 4 * tiles * call["width"])
    yield call.writes("scores", 4 * tiles * call["width"])
