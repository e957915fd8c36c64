"""The operations of a stack for one shape of input: many tokens of each sequence at once.

A thread finishes one tile before it begins the next, in buffers of its own that stay in its cache.
Threads wait where one needs the keys of another's tiles: once per block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hf_sparse.runtime.kernels import activation, attention, normalisation, tiles
from hf_sparse.runtime.kernels.call import Argument, Operation, Slot
from hf_sparse.runtime.llvm.jit import Code
from hf_sparse.runtime.programs.block import (
    Append,
    Attend,
    Buffer,
    FeedForward,
    HeadNorms,
    Multiply,
    Normalise,
    Rotate,
    Step,
    Uses,
    angles,
    residual,
    steps,
)
from hf_sparse.runtime.programs.dependences import ALL, Use, sections
from hf_sparse.runtime.programs.key_tables import cache_tables, table_addresses, tile_tables
from hf_sparse.runtime.programs.program import Program
from hf_sparse.runtime.programs.shape import Shape
from hf_sparse.runtime.programs.tile_buffers import TURNS, TileBuffers
from hf_sparse.runtime.programs.tiling import Tile, cut, share
from hf_sparse.runtime.weights.memory import aligned
from hf_sparse.runtime.weights.stack import Stack

# A position that no query is before, for attention that is not causal.
_EVERYWHERE = 1 << 29


@dataclass(frozen=True, eq=False)
class Load(Uses):
    """Turn what a call gives for `slot` into tiles."""

    slot: str
    y: Buffer
    READS = ()


@dataclass(frozen=True, eq=False)
class Store(Uses):
    """Turn tiles into the output, as that of number `state`."""

    x: Buffer
    state: int
    WRITES = ()


@dataclass(frozen=True, eq=False)
class Copy(Uses):
    """`y = x`."""

    x: Buffer
    y: Buffer


TileStep = Step | Load | Store | Copy
# A step, and the number of its block.
Numbered = tuple[int, TileStep]
# Where a tile's buffers are, by their names.
Places = Mapping[str, int]


class TileProgram:
    """A program for one shape, with its buffers.

    Attributes:
        masks: `(batch, capacity)`, added to the scores of keys.
        masked: they are not all 0.
        tables: `(blocks, batch, capacity / width, 3)`, the key tiles of the cache, if there is one.
        filled: address and shape of the tiles that they tell of.
    """

    def __init__(self, stack: Stack, code: Code, widths: Sequence[int], shape: Shape) -> None:
        self.shape, self._width = shape, widths[0]
        whole = [tile for b in range(shape.batch) for tile in cut(b, shape.tokens, widths)]
        lists = share(whole, shape.threads)
        numbered = list(_numbered(stack, shape))
        keys = {step.x.name for _, step in numbered if isinstance(step, Attend)}
        found = sections(numbered, lambda item: _uses(*item, keys, shape.cached))
        plain = [[step for _, step in section] for section in found]
        self._buffers = TileBuffers(plain, lists, widths[0], keys)
        self.masks = aligned(shape.batch, shape.capacity)
        self.masked = False
        self.filled: tuple[object, ...] = ()
        self._find_keys(len(stack.blocks), [tile for part in lists for tile in part], keys)
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
            for section in found
        ]
        memory = [stack, self._buffers.memory, self.masks, self.tables]
        self.program = Program(code, phases, memory)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, the tables and the operations."""
        own = self.tables.nbytes + self.masks.nbytes + self.program.nbytes
        return int(self._buffers.nbytes + own)

    def _find_keys(self, blocks: int, every: Sequence[Tile], keys: set[str]) -> None:
        """Make the tables of key tiles: those of the cache, or the input's own."""
        if self.shape.cached:
            entries = self.shape.capacity // self._width
            self.tables = cache_tables(blocks, self.shape.batch, entries, self._width)
        else:
            (name,) = keys
            every = sorted(every, key=lambda tile: (tile.sequence, tile.start))
            places = [
                [self._buffers.of(tile, turn)[name] for tile in every] for turn in range(TURNS)
            ]
            self.tables = tile_tables(places, [tile.width for tile in every])
        self._counts = Counter(tile.sequence for tile in every)
        self._first = {tile.sequence: number for number, tile in reversed(list(enumerate(every)))}
        self._table_at = table_addresses(self.tables)

    def _lower(self, step: TileStep, index: int, tile: Tile, at: Places) -> list[Operation]:
        """The operations of one step of block `index`, for one tile."""
        match step:
            case Normalise():
                name = normalisation.name(step.kind, tile.vectors)
                x, y = at[step.x.name], at[step.y.name]
                return [step.norm.operation(name, x, y, step.x.features)]
            case Multiply():
                x, y = at[step.x.name], at[step.y.name]
                return step.linear.operations(x, y, tile.vectors, add=step.add)
            case HeadNorms():
                return _norm_heads(step, tile, at)
            case Rotate():
                return [_rotate(step, tile, at)]
            case Append():
                return [self._append(step, index, tile, at)] if self.shape.cached else []
            case Attend():
                return [self._attend(step, index, tile, at)]
            case FeedForward():
                return _feed_forward(step, tile, at)
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
            table=self._table_at[index][tile.sequence],
            first=0,
            position=Slot("past", tile.start),
            width=self._width,
        )

    def _attend(self, step: Attend, index: int, tile: Tile, at: Places) -> Operation:
        heads, shape = step.heads, self.shape
        last = tile.start + tile.tokens if step.causal else shape.tokens
        count: Argument
        first: Argument
        if shape.cached:
            table, entries = self._table_at[index][tile.sequence], self.tables.shape[2]
            count, first, k_first = Slot("past", last), Slot("past", tile.start), 0
        else:
            table = self._table_at[index % TURNS][self._first[tile.sequence]]
            entries = self._counts[tile.sequence]
            count, first, k_first = last, tile.start, heads.query_rows
        return attention.SIGNATURE.operation(
            attention.name(tile.vectors),
            q=at[step.x.name],
            out=at[step.y.name],
            heads=heads.queries,
            head_dim=heads.dim,
            k_first=k_first,
            v_first=k_first + heads.key_rows,
            group=heads.group,
            table=table,
            key_tiles=entries,
            mask=self.masks[tile.sequence].data_ptr(),
            key_count=count,
            first_query=first if step.causal else _EVERYWHERE,
            window=step.window,
            scale=step.scale,
        )


def _numbered(stack: Stack, shape: Shape) -> Iterator[Numbered]:
    """All steps, from the input to the output, with their blocks' numbers."""
    x = residual(stack)
    yield 0, Load("hidden", x)
    for angle in angles(stack):
        yield 0, Load(angle.name, angle)
    for index, block in enumerate(stack.blocks):
        for step in steps(stack, block):
            for one in _without_overlap(step):
                yield index, one
        if shape.states or index == len(stack.blocks) - 1:
            yield index, Store(x, index if shape.states else 0)


def _without_overlap(step: Step) -> list[TileStep]:
    """A feed-forward that reads one buffer and adds to another: `down` adds to its goal while
    `opening` still reads, for later chunks, what was there."""
    if not isinstance(step, FeedForward) or step.down.y not in [one.x for one in step.opening]:
        return [step]
    source = Buffer("source", step.down.y.features)
    opening = tuple(replace(layer, x=source) for layer in step.opening)
    return [Copy(step.down.y, source), replace(step, opening=opening)]


def _uses(index: int, step: TileStep, keys: set[str], cached: bool) -> Iterator[Use]:
    """A thread uses its own tiles, and attention the keys of all."""

    def memory(buffer: Buffer) -> tuple[str, int]:
        return buffer.name, index % TURNS if buffer.name in keys else 0

    for buffer in step.reads:
        yield Use(memory(buffer), "own tiles", False)
    for buffer in step.writes:
        yield Use(memory(buffer), "own tiles", True)
    if isinstance(step, Append) and cached:
        yield Use(("cache", index), "own tiles", True)
    if isinstance(step, Attend):
        yield Use(("cache", index) if cached else memory(step.x), ALL, False)


def _norm_heads(step: HeadNorms, tile: Tile, at: Places) -> list[Operation]:
    heads, name = step.heads, normalisation.name("rms", tile.vectors)
    queries = at[step.x.name]
    keys = queries + 4 * tile.width * heads.query_rows
    return [
        step.queries.operation(name, queries, queries, heads.dim, heads.queries),
        step.keys.operation(name, keys, keys, heads.dim, heads.keys),
    ]


def _rotate(step: Rotate, tile: Tile, at: Places) -> Operation:
    return tiles.ROTARY.operation(
        f"rotary{tile.vectors}",
        x=at[step.x.name],
        heads=step.heads.queries + step.heads.keys,
        head_dim=step.heads.dim,
        cos=at[step.cos.name],
        sin=at[step.sin.name],
    )


def _feed_forward(step: FeedForward, tile: Tile, at: Places) -> list[Operation]:
    """A chunk of the intermediate features at a time, while it is in cache."""
    activate, down = step.activate, step.down
    x, other = at[activate.x.name], at[activate.other.name]
    found: list[Operation] = []
    for chunk, (start, stop) in enumerate(step.opening[0].linear.chunk_rows):
        back = 4 * tile.width * start  # kernels count rows from the first one
        for layer in step.opening:
            source, goal = at[layer.x.name], at[layer.y.name] - back
            found += layer.linear.operations(source, goal, tile.vectors, chunk=chunk)
        count = -(-(stop - start) * tile.vectors // activation.UNROLL) * activation.UNROLL
        found.append(activation.SIGNATURE.operation(activate.kernel, x=x, y=other, vectors=count))
        source, goal = at[down.x.name], at[down.y.name]
        found += down.linear.operations(source, goal, tile.vectors, add=down.add, part=chunk)
    return found
