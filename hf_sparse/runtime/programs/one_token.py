"""The operations of a stack for one new token of each sequence: generation.

The weights are read once for all sequences, each thread its rows. Threads meet where one needs what
others computed: five times in a block. Norms are computed by every thread for itself; a thread that
has a group of heads rotates, stores and attends for them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from hf_sparse.runtime.kernels import activation, addition, scored_attention, single_token, tiles
from hf_sparse.runtime.kernels.call import Argument, Operation, Slot
from hf_sparse.runtime.kernels.code_formats import BLOCK
from hf_sparse.runtime.kernels.code_rows import QUANTISE_ROW
from hf_sparse.runtime.llvm.jit import Code
from hf_sparse.runtime.programs import mixture_rows
from hf_sparse.runtime.programs.block import all_angles, residual
from hf_sparse.runtime.programs.dependences import sections
from hf_sparse.runtime.programs.distances import biases_of, nbytes_of
from hf_sparse.runtime.programs.head_parts import HeadPart, rotated_at_once
from hf_sparse.runtime.programs.nested import Nested
from hf_sparse.runtime.programs.program import Program
from hf_sparse.runtime.programs.row_buffers import RowBuffers
from hf_sparse.runtime.programs.row_steps import (
    Mixing,
    Numbered,
    RowStep,
    numbered_steps,
    own_buffers,
    uses,
)
from hf_sparse.runtime.programs.seen_keys import SeenKeys
from hf_sparse.runtime.programs.shape import Shape
from hf_sparse.runtime.programs.step import (
    Activate,
    Add,
    Append,
    Attend,
    Buffer,
    CloseExperts,
    HeadNorms,
    HeadStep,
    Multiply,
    Normalise,
    OpenExperts,
    Quantise,
    Rotate,
    Route,
    WidthNorms,
)
from hf_sparse.runtime.weights.memory import aligned
from hf_sparse.runtime.weights.rows import DECODE_ROWS, share_rows
from hf_sparse.runtime.weights.stack import Stack


class RowProgram:
    """A program for one new token of each of `shape.batch` sequences, with its buffers.

    Attributes:
        residual: `(copies, batch, hidden)`: the input in all copies before a run, the output in the
            first one behind it.
        seen, encoded: as `TileProgram`'s.
    """

    def __init__(self, stack: Stack, code: Code, lanes: int, width: int, shape: Shape) -> None:
        self.shape, self._lanes, self._width = shape, lanes, width
        numbered = list(numbered_steps(stack, crossing=shape.encoded > 0))
        every = [step for _, step in numbered]
        own = own_buffers(every)
        used = dict.fromkeys(buffer for step in every for buffer in (*step.reads, *step.writes))
        given = all_angles(stack)
        buffers = [buffer for buffer in used if buffer not in given]
        self._buffers = RowBuffers(buffers, own, shape.batch, shape.threads)
        self.residual = self._buffers.memory[residual(stack)][:, :, : stack.hidden]
        self._nested = Nested(code)
        blocks = len(stack.blocks)
        self.seen = SeenKeys(blocks, shape.batch, shape.capacity, width)
        self.encoded = SeenKeys(blocks, shape.batch, shape.encoded, width)
        self._scores = aligned(shape.threads, max(shape.capacity, shape.encoded))
        self._biases = biases_of(stack, shape.capacity + width, behind=False)
        phases = [
            [self._lower(section, thread) for thread in range(shape.threads)]
            for section in sections(numbered, lambda item: uses(item[1], own))
        ]
        memory = [stack, self._buffers.rows, self.seen.memory, self.encoded.memory]
        memory += [list(self._scores), [list(biases) for biases in self._biases]]
        memory.append(self._nested.memory)
        self.program = Program(code, phases, memory)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, the tables and the operations."""
        own = self.seen.nbytes + self.encoded.nbytes + self._scores.nbytes
        own += nbytes_of(self._biases) + self.program.nbytes
        return int(self._buffers.nbytes + self._nested.nbytes + own)

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
            case Quantise():
                return self._quantise(step, thread)
            case Activate():
                return self._activate(step, thread)
            case Add():
                return self._add(step, thread)
            case WidthNorms():
                return self._norm_widths(step, thread)
            case Route() | OpenExperts() | CloseExperts():
                return self._mix(step, thread)
        part = HeadPart.of(step.heads, thread, self.shape.threads, self._at(step.x, thread)[b])
        if not part.keys:
            return []
        match step:
            case HeadNorms():
                return _norm_heads(step, part)
            case Rotate():
                return _rotate(step, part, b)
            case Append():
                return self._append(step, part, self.seen.at[index][b])
            case Attend():
                return self._attend(step, part, index, thread, b)

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

    def _quantise(self, step: Quantise, thread: int) -> list[Operation]:
        """Every thread makes records of all features for itself: that is quicker than a wait."""
        blocks = -(-step.x.features // BLOCK)
        places = zip(self._at(step.x, thread), self._at(step.y, thread), strict=True)
        return [
            QUANTISE_ROW.operation("quantise_row", x=x, records=records, blocks=blocks)
            for x, records in places
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

    def _add(self, step: Add, thread: int) -> list[Operation]:
        first, last = share_rows(step.y.features, self.shape.threads)[thread]
        if first >= last:
            return []
        places = zip(self._at(step.x, thread), self._at(step.y, thread), strict=True)
        vectors = -(-(last - first) // self._lanes)
        return [
            addition.SIGNATURE.operation("add", x=x + 4 * first, y=y + 4 * first, vectors=vectors)
            for x, y in places
        ]

    def _mix(self, step: Mixing, thread: int) -> list[Operation]:
        """A thread's part of a mixture's steps: every thread routes, then each has its rows."""
        part = thread, self.shape.threads
        match step:
            case Route():
                routed = (step.logits, step.weights, step.counts)
                return mixture_rows.route(step, *(self._at(buffer, thread) for buffer in routed))
            case OpenExperts():
                reads = (step.source, step.route.weights, step.route.counts)
                each = [self._at(buffer, thread) for buffer in (*reads, step.gates, step.ups)]
                opened = list(zip(*each, strict=True))
                return mixture_rows.open_experts(step, part, self._lanes, self._nested, opened)
            case CloseExperts():
                used = (step.route.counts, step.gates, step.goal, step.room or step.gates)
                closed = list(zip(*(self._at(buffer, thread) for buffer in used), strict=True))
                return mixture_rows.close_experts(step, part, self._nested, closed)

    def _norm_widths(self, step: WidthNorms, thread: int) -> list[Operation]:
        """The first thread norms the queries, the last one the keys."""
        heads, operations = step.heads, []
        for place in self._at(step.x, thread):
            keys = place + 4 * heads.query_rows
            if thread == 0:
                operations.append(
                    step.queries.operation("rms_norm_row", place, place, heads.query_rows)
                )
            if thread == self.shape.threads - 1:
                operations.append(step.keys.operation("rms_norm_row", keys, keys, heads.key_rows))
        return operations

    def _append(self, step: Append, part: HeadPart, table: int) -> list[Operation]:
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

    def _attend(
        self, step: Attend, part: HeadPart, index: int, thread: int, b: int
    ) -> list[Operation]:
        """All heads of a part at once; with a cap or biases, one after the other."""
        heads, out = step.heads, self._at(step.y, thread)[b]
        seen = self.encoded if step.cross else self.seen
        shared: dict[str, Argument] = {
            "head_dim": heads.dim,
            "table": seen.at[index][b],
            "width": self._width,
            "mask": seen.masks[b].data_ptr(),
            "key_count": Slot("encoded") if step.cross else Slot("past", 1),
            "window": step.window,
            "scores": self._scores[thread].data_ptr(),
            "scale": step.scale,
        }

        def rows(keys: int) -> dict[str, Argument]:
            return {"k_first": keys * heads.dim, "v_first": heads.key_rows + keys * heads.dim}

        if step.plain:
            operation = single_token.ATTENTION.operation(
                "attention_row",
                q=part.queries_at,
                out=out + 4 * part.first * heads.dim * heads.group,
                heads=part.keys * heads.group,
                group=heads.group,
                **rows(part.first),
                **shared,
            )
            return [operation]
        first, biases = part.first * heads.group, self._biases[index]

        def bias(head: int) -> int:
            return biases[head, biases.shape[1] // 2 :].data_ptr() if step.biased else 0

        return [
            scored_attention.ROW.operation(
                "scored_row",
                q=part.queries_at + 4 * query * heads.dim,
                out=out + 4 * (first + query) * heads.dim,
                cap=step.softcap,
                bias=bias(first + query),
                **rows((first + query) // heads.group),
                **shared,
            )
            for query in range(part.queries)
        ]


def _norm_heads(step: HeadNorms, part: HeadPart) -> list[Operation]:
    return [
        norm.operation("rms_norm_row", at, at, step.heads.dim, count)
        for norm, (at, count) in zip((step.queries, step.keys), part.turned, strict=True)
    ]


def _rotate(step: Rotate, part: HeadPart, b: int) -> list[Operation]:
    dim, turned = step.heads.dim, step.cos.features
    cos, sin = (Slot(buffer.name, 4 * b * turned) for buffer in (step.cos, step.sin))
    return [
        tiles.ROTARY.operation(
            "rotary_row", x=at + 4 * dim * head, heads=some, head_dim=turned, cos=cos, sin=sin
        )
        for at, count in part.turned
        for head, some in rotated_at_once(count, dim, step.cos)
    ]
