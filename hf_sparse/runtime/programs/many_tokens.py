"""The operations of a stack for one shape of input: many tokens of each sequence at once.

Phases are divided by barriers where a thread needs the keys of another's tiles: there is one per
block. Within a phase a thread finishes one tile before it begins the next, in buffers of its own
that stay in its cache; queries, keys and values alternate between two buffers, since one block's
are still read when the next one's are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_sparse.runtime.kernels import activation, attention, normalisation, tiles
from hf_sparse.runtime.kernels.call import Argument, Operation, Slot
from hf_sparse.runtime.llvm.jit import Code
from hf_sparse.runtime.programs.program import Program
from hf_sparse.runtime.programs.tiling import Tile, cut, share
from hf_sparse.runtime.weights.memory import aligned
from hf_sparse.runtime.weights.panels import CHUNK_ROWS
from hf_sparse.runtime.weights.stack import NO_WINDOW, Block, Norm, Stack

# A position that no query is before, for attention that is not causal.
_EVERYWHERE = 1 << 29


@dataclass(frozen=True)
class Shape:
    """What a program is made for.

    Attributes:
        batch, tokens: of the input.
        threads: lists of operations.
        cached: keys and values go to a cache, behind those of `past` tokens.
        capacity: tokens for which there are masks and tables, a multiple of the tile's width.
        states: every block's output is written.
    """

    batch: int
    tokens: int
    threads: int
    cached: bool
    capacity: int
    states: bool


def cache_tables(blocks: int, batch: int, entries: int, width: int) -> NDArray[np.int64]:
    """Tables of a cache's key tiles, `(blocks, batch, entries, 3)`; addresses come with the cache."""
    tables = np.zeros((blocks, batch, entries, 3), np.int64)
    tables[..., 1], tables[..., 2] = 4 * width, width
    return tables


class TileProgram:
    """A program for one shape, with its buffers.

    Attributes:
        masks: `(batch, capacity)`, added to the scores of keys.
        tables: `(blocks, batch, capacity / width, 3)`, the key tiles of the cache, if there is one.
    """

    def __init__(self, stack: Stack, code: Code, widths: Sequence[int], shape: Shape) -> None:
        self.stack, self.shape, self.widths = stack, shape, widths
        whole = [tile for b in range(shape.batch) for tile in cut(b, shape.tokens, widths)]
        self.lists = share(whole, shape.threads)
        self.tiles = sorted(
            (tile for part in self.lists for tile in part),
            key=lambda tile: (tile.sequence, tile.start),
        )
        places = np.cumsum([0, *(tile.width for tile in self.tiles)])
        self.places = {tile: int(at) for tile, at in zip(self.tiles, places, strict=False)}
        self.masks = aligned(shape.batch, shape.capacity)
        self._reserve(int(places[-1]))
        phases = self._phases()
        self.program = Program(code, phases, [stack, self._buffers, self.tables])

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, the tables and the operations."""
        buffers = 4 * sum(buffer.numel() for buffer in self._buffers)
        return buffers + self.tables.nbytes + self.program.nbytes

    def _reserve(self, columns: int) -> None:
        """Allocate the buffers and fill in the tables of addresses."""
        stack, shape = self.stack, self.shape
        rows = stack.query_rows + 2 * stack.key_rows
        self.residual = aligned(columns, stack.hidden)
        self.qkv = [aligned(columns, rows) for _ in range(2)]
        widest, threads = self.widths[0], len(self.lists)
        scratch = max(stack.hidden, stack.query_rows)
        self.context = aligned(threads, scratch, widest)
        self.gate = aligned(threads, CHUNK_ROWS, widest)
        self.up = aligned(threads, CHUNK_ROWS, widest) if stack.blocks[0].gate else self.gate
        self.rotation = aligned(2, columns, stack.head_dim if stack.rotary else 0)
        self._buffers = [
            self.residual,
            *self.qkv,
            self.context,
            self.gate,
            self.up,
            self.rotation,
            self.masks,
        ]
        if shape.cached:
            entries = shape.capacity // widest
            self.tables = cache_tables(len(stack.blocks), shape.batch, entries, widest)
            return
        # Key tiles are the input's own, in one of the two buffers.
        self._first_tile: dict[int, int] = {}
        self.tables = np.zeros((2, len(self.tiles), 3), np.int64)
        for number, tile in enumerate(self.tiles):
            self._first_tile.setdefault(tile.sequence, number)
            for buffer in range(2):
                address = self._qkv(tile, buffer)
                self.tables[buffer, number] = (address, 4 * tile.width, tile.width)

    def _qkv(self, tile: Tile, buffer: int) -> int:
        rows = self.qkv[0].shape[1]
        return self.qkv[buffer].data_ptr() + 4 * rows * self.places[tile]

    def _x(self, tile: Tile) -> int:
        return self.residual.data_ptr() + 4 * self.stack.hidden * self.places[tile]

    def _rotation(self, tile: Tile, which: int) -> int:
        rows = self.stack.head_dim
        return self.rotation[which].data_ptr() + 4 * rows * self.places[tile]

    def _phases(self) -> list[list[list[Operation]]]:
        stack, shape = self.stack, self.shape
        first = [
            [
                operation
                for tile in part
                for operation in [
                    *self._enter(tile),
                    *self._project(stack.blocks[0], tile, thread, 0),
                    *self._append(tile, 0),
                ]
            ]
            for thread, part in enumerate(self.lists)
        ]
        phases = [first]
        for index, block in enumerate(stack.blocks):
            phase: list[list[Operation]] = []
            for thread, part in enumerate(self.lists):
                operations: list[Operation] = []
                for tile in part:
                    operations += self._attend(block, tile, thread, index)
                    operations += self._perceptron(block, tile, thread)
                    last = index == len(stack.blocks) - 1
                    if shape.states or last:
                        operations.append(self._leave(tile, index if shape.states else 0))
                    if not last:
                        following = stack.blocks[index + 1]
                        operations += self._project(following, tile, thread, (index + 1) % 2)
                        operations += self._append(tile, index + 1)
                phase.append(operations)
            phases.append(phase)
        return phases

    def _enter(self, tile: Tile) -> list[Operation]:
        """Turn the input, and the angles of its positions, into tiles."""
        stack, shape = self.stack, self.shape
        row = tile.sequence * shape.tokens + tile.start
        moved = [("hidden", self._x(tile), stack.hidden)]
        if stack.rotary:
            moved += [
                (name, self._rotation(tile, which), stack.head_dim)
                for which, name in enumerate(("cos", "sin"))
            ]
        return [
            tiles.TRANSPOSE.operation(
                f"to_tile{tile.vectors}",
                x=Slot(name, row * 4 * features),
                y=goal,
                features=features,
                tokens=tile.tokens,
                stride=4 * features,
            )
            for name, goal, features in moved
        ]

    def _leave(self, tile: Tile, state: int) -> Operation:
        shape, stride = self.shape, 4 * self.stack.hidden
        row = (state * shape.batch + tile.sequence) * shape.tokens + tile.start
        output = Slot("output", row * stride)
        return tiles.TRANSPOSE.operation(
            f"from_tile{tile.vectors}",
            x=self._x(tile),
            y=output,
            features=self.stack.hidden,
            tokens=tile.tokens,
            stride=stride,
        )

    def _norm(self, norm: Norm, tile: Tile, x: int, y: int) -> Operation:
        name = normalisation.name(self.stack.norm, tile.vectors)
        return norm.operation(name, x, y, self.stack.hidden)

    def _project(self, block: Block, tile: Tile, thread: int, buffer: int) -> list[Operation]:
        """Queries, keys and values of a tile."""
        stack = self.stack
        x, y = self._x(tile), self._qkv(tile, buffer)
        found: list[Operation] = []
        if stack.norm_first:
            normed = self.context[thread].data_ptr()
            found.append(self._norm(block.norms[0], tile, x, normed))
            x = normed
        found += block.qkv.operations(x, y, tile.vectors)
        queries, _ = stack.rows_of(block)
        keys = y + 4 * tile.width * queries
        heads, key_heads = stack.heads_of(block)
        if block.head_norms is not None:
            name = normalisation.name("rms", tile.vectors)
            places = ((y, heads), (keys, key_heads))
            for norm, (rows, count) in zip(block.head_norms, places, strict=True):
                found.append(norm.operation(name, rows, rows, stack.head_dim, count))
        if stack.rotary:
            found.append(
                tiles.ROTARY.operation(
                    f"rotary{tile.vectors}",
                    x=y,
                    heads=heads + key_heads,
                    head_dim=stack.head_dim,
                    cos=self._rotation(tile, 0),
                    sin=self._rotation(tile, 1),
                )
            )
        return found

    def _append(self, tile: Tile, index: int) -> list[Operation]:
        """Copy a tile's keys and values to the cache."""
        if not self.shape.cached:
            return []
        stack = self.stack
        queries, keys = stack.rows_of(stack.blocks[index])
        rows = self._qkv(tile, index % 2) + 4 * tile.width * queries
        return [
            tiles.APPEND.operation(
                "append",
                x=rows,
                features=2 * keys,
                tokens=tile.tokens,
                row_bytes=4 * tile.width,
                table=self.tables[index, tile.sequence].ctypes.data,
                first=0,
                position=Slot("past", tile.start),
                width=self.widths[0],
            )
        ]

    def _attend(self, block: Block, tile: Tile, thread: int, index: int) -> list[Operation]:
        """Attention, its projection, the residual, and the norm behind it."""
        stack, shape = self.stack, self.shape
        queries = self._qkv(tile, index % 2)
        heads, key_heads = stack.heads_of(block)
        query_rows, key_rows = stack.rows_of(block)
        context = self.context[thread].data_ptr()
        x = self._x(tile)
        last = tile.start + tile.tokens if stack.causal else shape.tokens
        count: Argument
        first: Argument
        if shape.cached:
            table = self.tables[index, tile.sequence].ctypes.data
            entries, k_first = self.tables.shape[2], 0
            count, first = Slot("past", last), Slot("past", tile.start)
        else:
            number = self._first_tile[tile.sequence]
            table = self.tables[index % 2, number].ctypes.data
            entries = sum(other.sequence == tile.sequence for other in self.tiles)
            k_first = query_rows
            count, first = last, tile.start
        if not stack.causal:
            first = _EVERYWHERE
        mask = self.masks[tile.sequence].data_ptr()
        window = block.window if stack.causal else NO_WINDOW
        found: list[Operation] = [
            attention.SIGNATURE.operation(
                attention.name(tile.vectors),
                q=queries,
                out=context,
                heads=heads,
                head_dim=stack.head_dim,
                k_first=k_first,
                v_first=k_first + key_rows,
                group=heads // key_heads,
                table=table,
                key_tiles=entries,
                mask=mask,
                key_count=count,
                first_query=first,
                window=window,
                scale=stack.scale,
            )
        ]
        found += block.out.operations(context, x, tile.vectors, add=True)
        if not stack.norm_first:
            found.append(self._norm(block.norms[0], tile, x, x))
        return found

    def _perceptron(self, block: Block, tile: Tile, thread: int) -> list[Operation]:
        """Both layers, a chunk of the intermediate features at a time, while it is in cache."""
        stack = self.stack
        x = self._x(tile)
        # The second layer adds to x while the first one still reads what x was.
        source = self.context[thread].data_ptr()
        found: list[Operation] = []
        if stack.norm_first:
            found.append(self._norm(block.norms[1], tile, x, source))
        else:
            vectors = stack.hidden * tile.vectors
            found.append(tiles.COPY.operation("copy", x=x, y=source, vectors=vectors))
        gate, up = self.gate[thread].data_ptr(), self.up[thread].data_ptr()
        opening = block.gate or block.up
        for chunk, (start, stop) in enumerate(opening.chunk_rows):
            back = 4 * tile.width * start  # kernels count rows from the first one
            count = -(-(stop - start) * tile.vectors // activation.UNROLL) * activation.UNROLL
            found += opening.operations(source, gate - back, tile.vectors, chunk=chunk)
            if block.gate is None:
                name, other = stack.activation, gate
            else:
                found += block.up.operations(source, up - back, tile.vectors, chunk=chunk)
                name, other = f"{stack.activation}_gate", up
            found.append(activation.SIGNATURE.operation(name, x=gate, y=other, vectors=count))
            found += block.down.operations(gate, x, tile.vectors, add=True, part=chunk)
        if not stack.norm_first:
            found.append(self._norm(block.norms[1], tile, x, x))
        return found
