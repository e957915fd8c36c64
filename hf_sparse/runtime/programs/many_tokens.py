"""The operations of a stack for one shape of input: many tokens of each sequence at once.

A thread finishes one tile before it begins the next, in buffers of its own that stay in its cache.
Threads wait where one needs the keys of another's tiles: once per block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from hf_sparse.runtime.kernels import activation, addition, normalisation, tiles
from hf_sparse.runtime.kernels.call import Argument, Operation, Slot
from hf_sparse.runtime.llvm.jit import Code
from hf_sparse.runtime.programs import mixture_tiles
from hf_sparse.runtime.programs.attending import Attending
from hf_sparse.runtime.programs.dependences import sections
from hf_sparse.runtime.programs.distances import biases_of, nbytes_of
from hf_sparse.runtime.programs.eight_bits import in_eight_bits, quantised
from hf_sparse.runtime.programs.head_parts import rotated_at_once
from hf_sparse.runtime.programs.key_tables import tile_tables
from hf_sparse.runtime.programs.nested import Nested
from hf_sparse.runtime.programs.program import Program
from hf_sparse.runtime.programs.seen_keys import SeenKeys
from hf_sparse.runtime.programs.shape import Shape
from hf_sparse.runtime.programs.step import (
    Add,
    Append,
    Attend,
    Experts,
    FeedForward,
    HeadNorms,
    Multiply,
    Normalise,
    Rotate,
    Route,
    WidthNorms,
)
from hf_sparse.runtime.programs.tile_buffers import TURNS, TileBuffers
from hf_sparse.runtime.programs.tile_steps import (
    Copy,
    Load,
    Store,
    TileStep,
    numbered_steps,
    uses,
)
from hf_sparse.runtime.programs.tiling import Tile, cut, share
from hf_sparse.runtime.weights.stack import Stack

# Where a tile's buffers are, by their names.
Places = Mapping[str, int]


class TileProgram:
    """A program for one shape, with its buffers.

    Attributes:
        seen: the keys of the input itself and of its past.
        encoded: those of an encoder's states.
        biases: of each block, `(heads, distances)`, added to scores, if the stack is biased; distance 0
            is in the middle, and those of tokens before it behind.
    """

    def __init__(self, stack: Stack, code: Code, widths: Sequence[int], shape: Shape) -> None:
        self.shape, self._width = shape, widths[0]
        whole = [tile for b in range(shape.batch) for tile in cut(b, shape.tokens, widths)]
        lists = share(whole, shape.threads)
        numbered = list(numbered_steps(stack, shape))
        attending = [step for _, step in numbered if isinstance(step, Attend)]
        keys = {step.x.name for step in attending if not step.cross}
        between_waits = sections(numbered, lambda item: uses(*item, keys, shape.cached))
        plain = [[step for _, step in section] for section in between_waits]
        self._buffers = TileBuffers(plain, lists, widths[0], keys)
        blocks = len(stack.blocks)
        self.seen = SeenKeys(blocks, shape.batch, shape.capacity, self._width)
        self.encoded = SeenKeys(blocks, shape.batch, shape.encoded, self._width)
        self._nested = Nested(code)
        self.biases = biases_of(stack, shape.capacity + self._width, behind=True)
        self._find_keys([tile for part in lists for tile in part], keys)
        phases = [
            [
                [
                    operation
                    for tile in part
                    for index, step in section
                    for operation in self._lower(step, index, tile, self._buffers.of(tile, index))
                ]
                for part in lists
            ]
            for section in between_waits
        ]
        memory = [stack, self._buffers.memory, self.seen.memory, self.encoded.memory]
        memory.append([list(biases) for biases in self.biases])
        memory.append(self._nested.memory)
        self.program = Program(code, phases, memory)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, the tables and the operations."""
        own = self.seen.nbytes + self.encoded.nbytes + nbytes_of(self.biases)
        return int(self._buffers.nbytes + self._nested.nbytes + own + self.program.nbytes)

    def _find_keys(self, every: Sequence[Tile], keys: set[str]) -> None:
        """Make the tables of the input's own key tiles, unless keys are in a cache."""
        if not self.shape.cached:
            (name,) = keys
            every = sorted(every, key=lambda tile: (tile.sequence, tile.start))
            places = [
                [self._buffers.of(tile, turn)[name] for tile in every] for turn in range(TURNS)
            ]
            self.seen.use(tile_tables(places, [tile.width for tile in every]))
        self._counts = Counter(tile.sequence for tile in every)
        self._first = {tile.sequence: number for number, tile in reversed(list(enumerate(every)))}

    def _lower(self, step: TileStep, index: int, tile: Tile, at: Places) -> list[Operation]:
        """The operations of one step of block `index`, for one tile."""
        match step:
            case Normalise():
                name = normalisation.name(step.kind, tile.vectors)
                x, y = at[step.x.name], at[step.y.name]
                return [step.norm.operation(name, x, y, step.x.features)]
            case Multiply():
                x, y = in_eight_bits(step, at), at[step.y.name]
                product = step.linear.operations(x, y, tile.vectors, add=step.add)
                return [*quantised(step, tile, at), *product]
            case Add():
                x, y, vectors = at[step.x.name], at[step.y.name], step.x.features * tile.vectors
                return [addition.SIGNATURE.operation("add", x=x, y=y, vectors=vectors)]
            case HeadNorms() | WidthNorms():
                return _norm_heads(step, tile, at)
            case Rotate():
                return _rotate(step, tile, at)
            case Append():
                return [self._append(step, index, tile, at)] if self.shape.cached else []
            case Attend():
                return self._attend(step, index, tile, at)
            case FeedForward():
                return _feed_forward(step, tile, at)
            case Route():
                return [mixture_tiles.route(step, tile, at)]
            case Experts():
                return mixture_tiles.run_experts(step, tile, at, self._nested, _feed_forward)
            case Load():
                return [self._load(step, tile, at)]
            case Store():
                return [self._store(step, tile, at)]
            case Copy():
                x, y, vectors = at[step.x.name], at[step.y.name], step.x.features * tile.vectors
                return [tiles.COPY.operation("copy", x=x, y=y, vectors=vectors)]

    def _load(self, step: Load, tile: Tile, at: Places) -> Operation:
        stride = 4 * step.y.features
        row = tile.sequence * self.shape.tokens + tile.start
        return tiles.TRANSPOSE.operation(
            f"to_tile{tile.vectors}",
            x=Slot(step.slot, row * stride),
            y=at[step.y.name],
            features=step.y.features,
            tokens=tile.tokens,
            stride=stride,
        )

    def _store(self, step: Store, tile: Tile, at: Places) -> Operation:
        shape, stride = self.shape, 4 * step.x.features
        row = (step.state * shape.batch + tile.sequence) * shape.tokens + tile.start
        return tiles.TRANSPOSE.operation(
            f"from_tile{tile.vectors}",
            x=at[step.x.name],
            y=Slot("output", row * stride),
            features=step.x.features,
            tokens=tile.tokens,
            stride=stride,
        )

    def _append(self, step: Append, index: int, tile: Tile, at: Places) -> Operation:
        """Copy a tile's keys and values to the cache."""
        return tiles.APPEND.operation(
            "append",
            x=at[step.x.name] + 4 * tile.width * step.heads.query_rows,
            features=2 * step.heads.key_rows,
            tokens=tile.tokens,
            row_bytes=4 * tile.width,
            table=self.seen.at[index][tile.sequence],
            first=0,
            position=Slot("past", tile.start),
            width=self._width,
        )

    def _attend(self, step: Attend, index: int, tile: Tile, at: Places) -> list[Operation]:
        heads, shape, sequence = step.heads, self.shape, tile.sequence
        last = tile.start + tile.tokens if step.causal else shape.tokens
        count: Argument = Slot("past", last)
        first: Argument = Slot("past", tile.start)
        k_first, mask = 0, self.seen.masks[sequence]
        if step.cross:
            table, key_tiles = self.encoded.at[index][sequence], self.encoded.tables.shape[2]
            count, mask = Slot("encoded"), self.encoded.masks[sequence]
        elif not shape.cached:
            table, key_tiles = (
                self.seen.at[index % TURNS][self._first[sequence]],
                self._counts[sequence],
            )
            count, first, k_first = last, tile.start, heads.query_rows
        else:
            table, key_tiles = self.seen.at[index][sequence], self.seen.tables.shape[2]
        attending = Attending(
            table=table,
            key_tiles=key_tiles,
            key_count=count,
            first_query=first,
            k_first=k_first,
            mask=mask.data_ptr(),
            biases=self.biases[index],
        )
        return attending.operations(step, tile, at[step.x.name], at[step.y.name])


def _norm_heads(step: HeadNorms | WidthNorms, tile: Tile, at: Places) -> list[Operation]:
    heads, name = step.heads, normalisation.name("rms", tile.vectors)
    queries = at[step.x.name]
    keys = queries + 4 * tile.width * heads.query_rows
    if isinstance(step, WidthNorms):
        return [
            step.queries.operation(name, queries, queries, heads.query_rows),
            step.keys.operation(name, keys, keys, heads.key_rows),
        ]
    return [
        step.queries.operation(name, queries, queries, heads.dim, heads.queries),
        step.keys.operation(name, keys, keys, heads.dim, heads.keys),
    ]


def _rotate(step: Rotate, tile: Tile, at: Places) -> list[Operation]:
    heads, first = step.heads, at[step.x.name]
    return [
        tiles.ROTARY.operation(
            f"rotary{tile.vectors}",
            x=first + 4 * tile.width * heads.dim * head,
            heads=count,
            head_dim=step.cos.features,
            cos=at[step.cos.name],
            sin=at[step.sin.name],
        )
        for head, count in rotated_at_once(heads.queries + heads.keys, heads.dim, step.cos)
    ]


def _feed_forward(step: FeedForward, tile: Tile, at: Places) -> list[Operation]:
    """A chunk of the intermediate features at a time, while it is in cache."""
    activate, down = step.activate, step.down
    x, other = at[activate.x.name], at[activate.other.name]
    found = quantised(step.opening[0], tile, at)
    for chunk, (start, stop) in enumerate(step.opening[0].linear.chunk_rows):
        back = 4 * tile.width * start  # kernels count rows from the first one
        for layer in step.opening:
            source, goal = in_eight_bits(layer, at), at[layer.y.name] - back
            found += layer.linear.operations(source, goal, tile.vectors, chunk=chunk)
        count = -(-(stop - start) * tile.vectors // activation.UNROLL) * activation.UNROLL
        found.append(activation.SIGNATURE.operation(activate.kernel, x=x, y=other, vectors=count))
        found += quantised(down, tile, at, stop - start)
        source, goal = in_eight_bits(down, at), at[down.y.name]
        found += down.linear.operations(source, goal, tile.vectors, add=down.add, part=chunk)
    return found
