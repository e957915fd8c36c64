"""Keys and values in tiles, as the kernels read them, inside transformers' own cache objects.

`generate` makes a DynamicCache; the compiled stack replaces its layers, which are still empty, by
`TileLayer`s. Beam search, batch expansion and cropping work on these as on transformers' own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_sparse.upstream.transformers.caches import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


class TileLayer(CacheLayerMixin):
    """The cache of one block.

    Attributes:
        tiles: `(batch, capacity / width, 2 * key features, width)` float32, keys before values.
        length: tokens that are there.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.rows, self.width, self.length = rows, width, 0
        self.tiles: Tensor = torch.empty(0)

    def reserve(self, batch: int, tokens: int) -> None:
        """Make room for `tokens` tokens of `batch` sequences, and keep what is there."""
        entries = -(-tokens // self.width)
        if not self.is_initialized:
            self.tiles = self._zeros(batch, entries)
            self.is_initialized = True
        elif self.tiles.shape[1] < entries:
            more = max(entries, 2 * self.tiles.shape[1]) - self.tiles.shape[1]
            grown = self._zeros(self.tiles.shape[0], self.tiles.shape[1] + more)
            grown[:, : self.tiles.shape[1]] = self.tiles
            self.tiles = grown
        if self.tiles.shape[0] != batch:
            raise ValueError(
                f"past_key_values holds {self.tiles.shape[0]} sequences, the input has {batch}."
            )

    def _zeros(self, batch: int, entries: int) -> Tensor:
        with torch.inference_mode(False):
            shape = (batch, entries, self.rows, self.width)
            return torch.zeros(*shape, dtype=torch.float32, device="cpu")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.update(key_states, value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `(batch, heads, tokens, head_dim)` and return all of them."""
        batch, heads, tokens, dim = key_states.shape
        if 2 * heads * dim != self.rows:
            raise ValueError(
                f"keys of {heads} heads of {dim} features; wanted {self.rows // 2} features in all: "
                "the cache is another model's."
            )
        self.reserve(batch, self.length + tokens)
        for start, states in ((0, key_states), (heads * dim, value_states)):
            flat = states.float().permute(0, 2, 1, 3).reshape(batch, tokens, heads * dim)
            for token in range(tokens):
                tile, place = divmod(self.length + token, self.width)
                self.tiles[:, tile, start : start + heads * dim, place] = flat[:, token]
        self.length += tokens
        flat = self.tiles.permute(0, 1, 3, 2).reshape(batch, -1, 2, heads, dim)[:, : self.length]
        keys, values = flat.permute(2, 0, 3, 1, 4)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.length, self.is_initialized = 0, False

    def offload(self) -> None:
        raise ValueError("a compiled model's cache is in memory already: use no offloaded cache.")

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: the number is positive, as transformers' layers refuse it.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): wanted a negative number of tokens to remove."
            )
        self.length -= min(abs(tokens_to_remove), self.length)
        # Kernels read whole tiles: what was forgotten must not be NaN in what they read and mask.
        first, place = divmod(self.length, self.width)
        self.tiles[:, first : first + 1, :, place:] = 0
        self.tiles[:, first + 1 :] = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.tiles = self.tiles.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.tiles = self.tiles[indices]


_IN_USE: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()


@contextmanager
def alone_with(cache: Any) -> Iterator[None]:
    """Keep others from a cache for a while; None needs no keeping.

    Raises:
        ValueError: another thread is at it.
    """
    if cache is None:
        yield
        return
    lock = _IN_USE.setdefault(cache, threading.Lock())
    if not lock.acquire(blocking=False):
        raise ValueError(
            "past_key_values is in use by another thread: each needs a cache of its own."
        )
    try:
        yield
    finally:
        lock.release()


def tile_layers(cache: Any, rows: Sequence[int], width: int) -> list[TileLayer]:
    """The layers of a Cache as TileLayers; empty ones, or dynamic ones, are replaced.

    Args:
        cache: transformers' own.
        rows: of each block's tiles.
        width: of a tile.

    Raises:
        ValueError: the cache is of another kind (static, quantised, offloaded, a subclass with an
            `update` of its own), or its layers hold different numbers of tokens.
    """
    if not isinstance(cache, Cache):
        raise ValueError(
            f"the cache is a {type(cache).__name__}; a compiled model needs a DynamicCache, "
            "transformers' default."
        )
    if getattr(cache.update, "__func__", None) is not Cache.update:
        raise ValueError(
            f"past_key_values is a {type(cache).__name__} with an update of its own, which a compiled "
            "model does not call; wanted a DynamicCache, transformers' default."
        )
    layers: list[Any] = cache.layers
    if any(isinstance(layer, TileLayer) for layer in layers):
        sizes = [(getattr(x, "rows", None), getattr(x, "width", None)) for x in layers]
        if sizes != [(count, width) for count in rows]:
            raise ValueError("past_key_values is the cache of another compiled model.")
        return _even(layers)
    if getattr(cache, "offloading", False):
        raise ValueError("an offloaded cache cannot be used: a compiled model runs on the CPU.")
    layers = []
    for index, count in enumerate(rows):
        old: Any = cache.layers[index] if index < len(cache.layers) else DynamicLayer()
        plain = type(old) in (DynamicLayer, DynamicSlidingWindowLayer)
        if not plain or "update" in vars(old):
            raise ValueError(
                f"past_key_values has a {type(old).__name__}; a compiled model needs a DynamicCache, "
                "transformers' default: leave cache_implementation out."
            )
        layer = TileLayer(count, width)
        if old.is_initialized and old.get_seq_length():
            if old.is_sliding:
                raise ValueError(
                    "past_key_values of a sliding window was filled by another model and lacks "
                    "tokens: start with an empty cache."
                )
            keys: Any = old.keys
            values: Any = old.values
            layer.update(keys, values)
        layers.append(layer)
    cache.layers = _even(layers)
    return layers


def _even(layers: list[Any]) -> list[Any]:
    """The layers, if all hold as many tokens: one number of tokens serves all blocks."""
    lengths = [layer.length for layer in layers]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"the layers of past_key_values hold {lengths[:9]} tokens; wanted the same number in all. "
            "Crop all layers alike, or start with an empty cache."
        )
    return layers
