"""What an encoder gave, for the blocks of a decoder, and the keys and values that are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_sparse.runtime.programs.cache import TileLayer, tile_layers


@dataclass(frozen=True)
class Encoded:
    """The states of an encoder.

    Attributes:
        states: `(batch, tokens, features)`.
        mask: `(batch, tokens)`, true for the tokens that are seen, or None for all.
        cache: transformers' cache of an encoder and a decoder, which keeps their keys and values; None:
            they are computed for this call alone.
    """

    states: Tensor
    mask: Tensor | None
    cache: Any

    @property
    def is_kept(self) -> bool:
        """Whether the cache has keys and values of all blocks already."""
        kept: dict[int, bool] = {} if self.cache is None else self.cache.is_updated
        return any(kept.values())

    def keep(self) -> None:
        """Tell the cache that it has them."""
        if self.cache is not None:
            for index in range(len(self.cache.cross_attention_cache.layers)):
                self.cache.is_updated[index] = True

    def layers(self, rows: Sequence[int], width: int) -> list[TileLayer]:
        """The tiles of each block's keys and values, which may be empty still.

        Args:
            rows: of each block's tiles.
            width: of a tile.
        """
        if self.cache is None:
            return [TileLayer(count, width) for count in rows]
        layers = tile_layers(self.cache.cross_attention_cache, rows, width)
        if layers[0].length and not self.is_kept:
            raise ValueError(
                "the cache has keys of an encoder's states, and tells that it has none "
                "(is_updated): start with an empty cache."
            )
        return layers

    def check(self, layer: TileLayer, batch: int) -> None:
        """Compare what is kept with a call of `batch` sequences.

        Raises:
            ValueError: there are other numbers of sequences, or of tokens in the mask, or no tokens.
        """
        if layer.tiles.shape[0] != batch or not layer.length:
            raise ValueError(
                f"the encoder's states are {layer.tiles.shape[0]} sequences of {layer.length} tokens; "
                f"wanted {batch} sequences, as the decoder has, of one token or more."
            )
        if self.mask is not None and tuple(self.mask.shape) != (batch, layer.length):
            raise ValueError(
                f"encoder_attention_mask has the shape {tuple(self.mask.shape)}; wanted "
                f"{(batch, layer.length)}: a number for each token of the encoder."
            )
