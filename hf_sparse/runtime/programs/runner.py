"""Running a packed stack: programs are made for each shape of input, and kept."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_sparse.runtime.kernels.all import kernels
from hf_sparse.runtime.kernels.extents import rounded_up
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.programs.block import all_angles
from hf_sparse.runtime.programs.cache import TileLayer, tile_layers
from hf_sparse.runtime.programs.encoded import Encoded
from hf_sparse.runtime.programs.many_tokens import TileProgram
from hf_sparse.runtime.programs.one_token import RowProgram
from hf_sparse.runtime.programs.pool import KEPT_BYTES, Pool
from hf_sparse.runtime.programs.row_steps import fits
from hf_sparse.runtime.programs.shape import Shape
from hf_sparse.runtime.weights.stack import Stack
from hf_sparse.upstream.transformers.caches import Cache

# Kernels count positions in 32 bits, and windows reach this far back, and further.
MAX_TOKENS = 1 << 29
# Masks and tables grow by this many tokens at a time, so that generation seldom needs a new program.
_CAPACITY = 512


class Runner:
    """A stack on a target. Safe to call from several threads: a program serves one call at a time."""

    def __init__(self, stack: Stack, target: Target, cache: Path | None) -> None:
        self.stack, self.target = stack, target
        self.code = kernels(target, cache, stack.weight_type, stack.has_codes)
        self._key_rows = [2 * stack.rows_of(block)[1] for block in stack.blocks]
        self._given_biases = stack.biased and stack.blocks[0].distances is None
        # What the first block computed, for the others: of each calling thread.
        self.results = threading.local()
        self._programs: Pool[TileProgram | RowProgram] = Pool(KEPT_BYTES)

    def __call__(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        rotations: Sequence[tuple[Tensor, Tensor]] = (),
        cache: Cache | None = None,
        states: bool = False,
        bias: Tensor | None = None,
        encoded: Encoded | None = None,
    ) -> Tensor:
        """Run all blocks.

        Args:
            hidden: `(batch, tokens, hidden)` float32.
            mask: `(batch, past + tokens)`, true for the keys that are seen, or None for all.
            rotations: cos and sin, `(batch or 1, tokens, rotated features)`, if the stack is rotary:
                as many as its blocks have.
            cache: receives keys and values, and has those of the past.
            states: return what each block gives, not only the last.
            bias: `(heads, 2 * tokens - 1)`, added to scores, by how far a query is behind a key, if
                the stack is biased, and its blocks have no `distances`.
            encoded: the states of an encoder, if blocks attend to some.

        Returns:
            `(batch, tokens, hidden)`, with `states` `(blocks, batch, tokens, hidden)`.
        """
        batch, tokens, width = hidden.shape
        if width != self.stack.hidden or not tokens or not batch:
            raise ValueError(
                f"hidden states are {tuple(hidden.shape)}; wanted (batch, tokens, {self.stack.hidden})"
                ", none of them 0."
            )
        layers: list[TileLayer] = []
        past = 0
        if cache is not None:
            layers = tile_layers(cache, self._key_rows, self.target.widths[0])
            past = layers[0].length
        self._check_positions(rotations, bias, tokens)
        if past + tokens > MAX_TOKENS:
            raise ValueError(
                f"the sequences have {past + tokens} tokens; a compiled model takes {MAX_TOKENS}."
            )
        if mask is not None and mask.shape != (batch, past + tokens):
            raise ValueError(
                f"attention_mask has the shape {tuple(mask.shape)}; wanted {(batch, past + tokens)}: "
                "a number for each token, those in past_key_values included."
            )
        for layer in layers:
            layer.reserve(batch, past + tokens)
        unit = _CAPACITY if cache is not None else self.target.widths[0]
        others = [] if encoded is None else self._keys_of(encoded, batch)
        shape = Shape(
            batch,
            tokens,
            torch.get_num_threads(),
            cache is not None,
            rounded_up(past + tokens, unit),
            states,
            rounded_up(others[0].length, unit) if others else 0,
        )
        with self._programs.borrow(shape, lambda: self._make(shape)) as program:
            if bias is not None and isinstance(program, TileProgram):
                biases = program.biases[0]
                middle = biases.shape[1] // 2
                biases[:, middle - tokens + 1 : middle + tokens] = bias
            if encoded is not None:
                program.encoded.see(encoded.mask)
                program.encoded.find(others)
            hidden = hidden / self.stack.multiplier if self.stack.multiplier != 1 else hidden
            addresses = {"past": past, "encoded": others[0].length if others else 0}
            output = self._run(program, hidden, mask, rotations, layers, addresses, others)
            output = output * self.stack.multiplier if self.stack.multiplier != 1 else output
        for layer in layers:
            layer.length += tokens
        return output

    def _check_positions(
        self, rotations: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None, tokens: int
    ) -> None:
        """Refuse a call whose positions are others than the blocks were compiled for."""
        if len(rotations) != self.stack.rotations:
            raise ValueError(
                f"position_embeddings are missing: {len(rotations)} are given; wanted cos and sin of "
                f"the positions, {self.stack.rotations} times."
            )
        widths = {one.shape[-1] for pair in rotations for one in pair}
        if rotations and widths != {self.stack.rotary_dim}:
            raise ValueError(
                f"position_embeddings have {sorted(widths)} features; wanted {self.stack.rotary_dim}."
            )
        wanted = (self.stack.heads, 2 * tokens - 1) if self._given_biases else None
        shape = None if bias is None else tuple(bias.shape)
        if shape != wanted:
            raise ValueError(f"the bias by distance has the shape {shape}; wanted {wanted}.")

    def _keys_of(self, encoded: Encoded, batch: int) -> list[TileLayer]:
        """The keys and values of an encoder's states, computed unless a cache has them."""
        rows = [block.cross.keys.rows for block in self.stack.blocks if block.cross is not None]
        layers = encoded.layers(rows, self.target.widths[0])
        if not encoded.is_kept:
            self._fill(encoded.states, layers)
            encoded.keep()
        encoded.check(layers[0], batch)
        return layers

    def _fill(self, states: Tensor, layers: list[TileLayer]) -> None:
        """Put the keys and values of an encoder's states `(batch, tokens, features)` into tiles."""
        batch, tokens, width = states.shape
        cross = self.stack.blocks[0].cross
        columns = None if cross is None else cross.keys.columns
        if width != columns or not tokens:
            raise ValueError(
                f"encoder_hidden_states are {tuple(states.shape)}; wanted (batch, tokens, {columns}), "
                "one token or more."
            )
        capacity = rounded_up(tokens, self.target.widths[0])
        threads = torch.get_num_threads()
        shape = Shape(batch, tokens, threads, True, capacity, False, filling=True)
        states = states.detach().float().contiguous()
        for layer in layers:
            layer.reserve(batch, tokens)
        with self._programs.borrow(shape, lambda: self._make(shape)) as program:
            program.seen.find(layers)
            program.program.run(lambda: [states, *_tiles(layers)], hidden=states.data_ptr(), past=0)
        for layer in layers:
            layer.length = tokens

    def _run(
        self,
        program: TileProgram | RowProgram,
        hidden: Tensor,
        mask: Tensor | None,
        rotations: Sequence[tuple[Tensor, Tensor]],
        layers: list[TileLayer],
        addresses: dict[str, int],
        others: list[TileLayer],
    ) -> Tensor:
        shape = program.shape
        program.seen.see(mask)
        shaped = (shape.batch, shape.tokens, self.stack.rotary_dim)
        angles = [one.float().expand(shaped).contiguous() for pair in rotations for one in pair]
        for buffer, one in zip(all_angles(self.stack), angles, strict=True):
            addresses[buffer.name] = one.data_ptr()
        if layers:
            program.seen.find(layers)
        if isinstance(program, RowProgram):
            program.residual.copy_(hidden[:, 0])
            program.program.run(lambda: [angles, *_tiles([*layers, *others])], **addresses)
            return program.residual[0][:, None].clone()
        hidden = hidden.contiguous()
        sizes = (len(self.stack.blocks),) if shape.states else ()
        output = torch.empty(*sizes, *hidden.shape, dtype=torch.float32, device="cpu")
        program.program.run(
            lambda: [hidden, output, angles, *_tiles([*layers, *others])],
            hidden=hidden.data_ptr(),
            output=output.data_ptr(),
            **addresses,
        )
        return output

    def _make(self, shape: Shape) -> TileProgram | RowProgram:
        single = shape.tokens == 1 and shape.cached and not (shape.states or shape.filling)
        widths = self.target.widths
        if single and fits(self.stack):
            return RowProgram(self.stack, self.code, self.target.lanes, widths[0], shape)
        return TileProgram(self.stack, self.code, widths, shape)


def _tiles(layers: Sequence[TileLayer]) -> list[Tensor]:
    return [layer.tiles for layer in layers]
