"""The operations of a stack for one new token of each sequence: generation.

The weights are read once for all sequences, each thread its rows. Threads meet where one needs what
others computed: five times in a block. Norms are computed by every thread for itself; a thread that
has a group of heads rotates, stores and attends for them alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from hf_sparse.runtime.kernels import activation, single_token, tiles
from hf_sparse.runtime.kernels.call import Operation, Slot
from hf_sparse.runtime.llvm.jit import Code
from hf_sparse.runtime.programs.block import (
    Activate,
    Append,
    Attend,
    Buffer,
    FeedForward,
    HeadNorms,
    Heads,
    HeadStep,
    Multiply,
    Normalise,
    Rotate,
    angles,
    residual,
    steps,
)
from hf_sparse.runtime.programs.dependences import ALL, Use, sections
from hf_sparse.runtime.programs.key_tables import cache_tables, table_addresses
from hf_sparse.runtime.programs.program import Program
from hf_sparse.runtime.programs.row_buffers import RowBuffers
from hf_sparse.runtime.programs.shape import Shape
from hf_sparse.runtime.weights.memory import aligned
from hf_sparse.runtime.weights.rows import DECODE_ROWS, share_rows
from hf_sparse.runtime.weights.stack import Stack

RowStep = Normalise | Multiply | HeadStep | Activate
# A step, and the number of its block.
Numbered = tuple[int, RowStep]


def fits(stack: Stack) -> bool:
    """Whether a stack's single tokens can be computed by rows: else they go as narrow tiles."""
    every = [step for _, step in _numbered(stack)]
    own = _own(every)
    alone = all(own.isdisjoint(step.writes) for step in every if not isinstance(step, Normalise))
    return alone and all(step.causal for step in every if isinstance(step, Attend))


class RowProgram:
    """A program for one new token of each of `shape.batch` sequences, with its buffers.

    Attributes:
        residual: `(batch, hidden)`: the input before a run, the output behind it.
        masks, masked, tables, filled: as `TileProgram`'s.
    """

    def __init__(self, stack: Stack, code: Code, lanes: int, width: int, shape: Shape) -> None:
        self.shape, self._lanes, self._width = shape, lanes, width
        numbered = list(_numbered(stack))
        every = [step for _, step in numbered]
        own = _own(every)
        used = dict.fromkeys(buffer for step in every for buffer in (*step.reads, *step.writes))
        given = angles(stack)
        buffers = [buffer for buffer in used if buffer not in given]
        self._buffers = RowBuffers(buffers, own, shape.batch, shape.threads)
        self.residual = self._buffers.memory[residual(stack)][0, :, : stack.hidden]
        self.masks = aligned(shape.batch, shape.capacity)
        self.masked = False
        self.filled: tuple[object, ...] = ()
        self._scores = aligned(shape.threads, shape.capacity)
        entries = shape.capacity // width
        self.tables = cache_tables(len(stack.blocks), shape.batch, entries, width)
        self._table_at = table_addresses(self.tables)
        phases = [
            [self._lower(section, thread) for thread in range(shape.threads)]
            for section in sections(numbered, lambda item: _uses(item[1], own))
        ]
        memory = [stack, self._buffers.memory, self.masks, self._scores, self.tables]
        self.program = Program(code, phases, memory)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, the tables and the operations."""
        own = self.masks.nbytes + self._scores.nbytes + self.tables.nbytes + self.program.nbytes
        return int(self._buffers.nbytes + own)

    def _lower(self, section: Sequence[Numbered], thread: int) -> list[Operation]:
        """A thread's operations of the steps between two waits."""
        found: list[Operation] = []
        for by_heads, group in groupby(section, lambda item: isinstance(item[1], HeadStep)):
            part = list(group)
            # A thread does all steps of its heads for a sequence before it goes to the next one.
            for b in range(self.shape.batch if by_heads else 1):
                for index, step in part:
                    found += self._step(step, index, thread, b)
        return found

    def _step(self, step: RowStep, index: int, thread: int, b: int) -> list[Operation]:
        """A thread's part of a step: its rows of all sequences, or its heads of sequence `b`."""
        match step:
            case Normalise():
                name, features = f"{step.kind}_norm_row", step.x.features
                places = zip(self._at(step.x, thread), self._at(step.y, thread), strict=True)
                return [step.norm.operation(name, x, y, features) for x, y in places]
            case Multiply():
                return self._multiply(step, thread)
            case Activate():
                return self._activate(step, thread)
        part = _HeadPart.of(step.heads, thread, self.shape.threads, self._at(step.x, thread)[b])
        if not part.keys:
            return []
        match step:
            case HeadNorms():
                return _norm_heads(step, part)
            case Rotate():
                return _rotate(step, part, b)
            case Append():
                return self._append(step, part, self._table_at[index][b])
            case Attend():
                return [self._attend(step, part, index, thread, b)]

    def _at(self, buffer: Buffer, thread: int) -> list[int]:
        return self._buffers.of(buffer, thread)

    def _multiply(self, step: Multiply, thread: int) -> list[Operation]:
        """A thread's rows; the same rows for all sequences, while they are in cache."""
        linear, batch = step.linear, self.shape.batch
        first, last = share_rows(linear.rows, self.shape.threads)[thread]
        if first >= last:
            return []
        x, y = self._at(step.x, thread), self._at(step.y, thread)
        unit = last - first if batch == 1 else 4 * DECODE_ROWS
        return [
            linear.row_operation(x[b], y[b], start, min(start + unit, last), add=step.add)
            for start in range(first, last, unit)
            for b in range(batch)
        ]

    def _activate(self, step: Activate, thread: int) -> list[Operation]:
        first, last = share_rows(step.x.features, self.shape.threads)[thread]
        if first >= last:
            return []
        count = -(-(last - first) // self._lanes)
        places = zip(self._at(step.x, thread), self._at(step.other, thread), strict=True)
        return [
            activation.SIGNATURE.operation(
                step.kernel, x=x + 4 * first, y=other + 4 * first, vectors=count
            )
            for x, other in places
        ]

    def _append(self, step: Append, part: _HeadPart, table: int) -> list[Operation]:
        dim, key_rows = step.heads.dim, step.heads.key_rows
        return [
            tiles.APPEND.operation(
                "append",
                x=place,
                features=part.keys * dim,
                tokens=1,
                row_bytes=4,
                table=table,
                first=first + part.first * dim,
                position=Slot("past"),
                width=self._width,
            )
            for place, first in ((part.keys_at, 0), (part.values_at, key_rows))
        ]

    def _attend(self, step: Attend, part: _HeadPart, index: int, thread: int, b: int) -> Operation:
        heads = step.heads
        first = part.first * heads.dim
        return single_token.ATTENTION.operation(
            "attention_row",
            q=part.queries_at,
            out=self._at(step.y, thread)[b] + 4 * first * heads.group,
            heads=part.keys * heads.group,
            head_dim=heads.dim,
            k_first=first,
            v_first=heads.key_rows + first,
            group=heads.group,
            table=self._table_at[index][b],
            width=self._width,
            mask=self.masks[b].data_ptr(),
            key_count=Slot("past", 1),
            window=step.window,
            scores=self._scores[thread].data_ptr(),
            scale=step.scale,
        )


@dataclass(frozen=True)
class _HeadPart:
    """A thread's heads of keys, and the queries that share them.

    Attributes:
        first, keys: the first of its heads of keys, and how many it has.
        queries: heads of queries.
        queries_at, keys_at, values_at: addresses.
    """

    first: int
    keys: int
    queries: int
    queries_at: int
    keys_at: int
    values_at: int

    @classmethod
    def of(cls, heads: Heads, thread: int, threads: int, at: int) -> _HeadPart:
        """The part of `thread` in a vector at the address `at`."""
        first, last = (round(heads.keys * number / threads) for number in (thread, thread + 1))
        queries_at = at + 4 * first * heads.group * heads.dim
        keys_at = at + 4 * (heads.query_rows + first * heads.dim)
        keys, values_at = last - first, keys_at + 4 * heads.key_rows
        return cls(first, keys, keys * heads.group, queries_at, keys_at, values_at)

    @property
    def turned(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where queries and keys are, and how many heads of each."""
        return (self.queries_at, self.queries), (self.keys_at, self.keys)


def _norm_heads(step: HeadNorms, part: _HeadPart) -> list[Operation]:
    return [
        norm.operation("rms_norm_row", at, at, step.heads.dim, count)
        for norm, (at, count) in zip((step.queries, step.keys), part.turned, strict=True)
    ]


def _rotate(step: Rotate, part: _HeadPart, b: int) -> list[Operation]:
    dim = step.heads.dim
    cos, sin = (Slot(buffer.name, 4 * b * dim) for buffer in (step.cos, step.sin))
    return [
        tiles.ROTARY.operation("rotary_row", x=at, heads=count, head_dim=dim, cos=cos, sin=sin)
        for at, count in part.turned
    ]


def _numbered(stack: Stack) -> Iterator[Numbered]:
    """All steps with their blocks' numbers."""
    for index, block in enumerate(stack.blocks):
        for step in steps(stack, block):
            for one in step.parts if isinstance(step, FeedForward) else (step,):
                yield index, one


def _own(every: Sequence[RowStep]) -> set[Buffer]:
    """The buffers that each thread has for itself: every thread norms all features."""
    return {step.y for step in every if isinstance(step, Normalise)}


def _uses(step: RowStep, own: set[Buffer]) -> Iterator[Use]:
    """A norm reads all features, and so does a weight; else a thread uses its rows, or its heads."""
    part: Hashable
    match step:
        case Multiply():
            part = step.linear.rows
        case Activate():
            part = step.x.features
        case Normalise():
            part = ALL
        case _:
            part = step.heads
    whole = (step.x,) if isinstance(step, Multiply) else ()
    for buffer in step.reads:
        if buffer not in own:
            yield Use(buffer, ALL if buffer in whole else part, False)
    for buffer in step.writes:
        if buffer not in own:
            yield Use(buffer, part, True)
