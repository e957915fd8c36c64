"""The operations of a stack for one new token of each sequence: generation.

The weights are read once for all sequences, each thread its rows. Threads meet where one needs what
others computed: five times in a block. Norms are computed by every thread for itself; a thread that
has a group of heads rotates, stores and attends for them alone.
"""

from __future__ import annotations

import torch

from hf_sparse.runtime.kernels import activation, single_token, tiles
from hf_sparse.runtime.kernels.call import Operation, Slot
from hf_sparse.runtime.llvm.jit import Code
from hf_sparse.runtime.programs.many_tokens import Shape, cache_tables
from hf_sparse.runtime.programs.program import Program
from hf_sparse.runtime.weights.linear import Linear
from hf_sparse.runtime.weights.memory import aligned
from hf_sparse.runtime.weights.rows import DECODE_ROWS, share_rows
from hf_sparse.runtime.weights.stack import Block, Norm, Stack


def fits(stack: Stack) -> bool:
    """Whether a stack's single tokens can be computed by rows: else they go as narrow tiles."""
    return stack.causal and stack.norm_first


class RowProgram:
    """A program for one new token of each of `shape.batch` sequences, with its buffers.

    Kernels read and write a few features more than a vector has. So every vector has room behind it
    that is its own, and zeros stay there: a buffer that a weight reads is written by vectors of one
    size only, and blocks of another size (`hf_sparse.shrink_`) have another buffer.

    Attributes:
        residual: `(batch, hidden)`: the input before a run, the output behind it.
        masks, tables: as `TileProgram`'s.
    """

    def __init__(self, stack: Stack, code: Code, lanes: int, width: int, shape: Shape) -> None:
        self.stack, self.shape, self.lanes, self.width = stack, shape, lanes, width
        batch, threads = shape.batch, shape.threads
        self.residual = aligned(batch, _padded(stack.hidden))[:, : stack.hidden]
        self.masks = aligned(batch, shape.capacity)
        entries = shape.capacity // width
        self.tables = cache_tables(len(stack.blocks), batch, entries, width)
        self._normed = aligned(threads, batch, _padded(stack.hidden))
        self._qkv = aligned(batch, _padded(stack.query_rows + 2 * stack.key_rows))
        queries = {block.out.columns for block in stack.blocks}
        neurons = {block.down.columns for block in stack.blocks}
        self._contexts = {size: aligned(batch, _padded(size)) for size in queries}
        self._gates = {size: aligned(batch, _padded(size)) for size in neurons}
        self._ups = self._gates
        if stack.blocks[0].gate is not None:
            self._ups = {size: aligned(batch, _padded(size)) for size in neurons}
        self._scores = aligned(threads, shape.capacity)
        self._buffers = [
            self.residual,
            self.masks,
            self._normed,
            self._qkv,
            *self._contexts.values(),
            *self._gates.values(),
            *(self._ups.values() if self._ups is not self._gates else ()),
            self._scores,
        ]
        phases = [
            phase for index, block in enumerate(stack.blocks) for phase in self._block(index, block)
        ]
        self.program = Program(code, phases, [stack, self._buffers, self.tables])

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, the tables and the operations."""
        buffers = sum(buffer.nbytes for buffer in self._buffers)
        return int(buffers + self.tables.nbytes + self.program.nbytes)

    def _block(self, index: int, block: Block) -> list[list[list[Operation]]]:
        threads = range(self.shape.threads)
        opening = block.gate or block.up
        context = self._contexts[block.out.columns]
        gate, up = self._gates[opening.rows], self._ups[opening.rows]
        return [
            [
                [
                    *self._norm(block.norms[0], thread),
                    *self._multiply(block.qkv, self._normed[thread], self._qkv, thread),
                ]
                for thread in threads
            ],
            [self._attend(index, block, thread) for thread in threads],
            [
                self._multiply(block.out, context, self.residual, thread, add=True)
                for thread in threads
            ],
            [
                [
                    *self._norm(block.norms[1], thread),
                    *self._multiply(opening, self._normed[thread], gate, thread),
                    *(
                        self._multiply(block.up, self._normed[thread], up, thread)
                        if block.gate
                        else []
                    ),
                    *self._activate(block, thread),
                ]
                for thread in threads
            ],
            [
                self._multiply(block.down, gate, self.residual, thread, add=True)
                for thread in threads
            ],
        ]

    def _rows(self, linear: Linear, thread: int) -> tuple[int, int]:
        """A thread's rows of a weight."""
        return share_rows(linear.rows, self.shape.threads)[thread]

    def _norm(self, norm: Norm, thread: int) -> list[Operation]:
        name = f"{self.stack.norm}_norm_row"
        return [
            norm.operation(name, x.data_ptr(), y.data_ptr(), self.stack.hidden)
            for x, y in zip(self.residual, self._normed[thread], strict=True)
        ]

    def _multiply(
        self, linear: Linear, x: torch.Tensor, y: torch.Tensor, thread: int, add: bool = False
    ) -> list[Operation]:
        """A thread's rows; the same rows for all sequences, while they are in cache."""
        first, last = self._rows(linear, thread)
        if first >= last:
            return []
        return [
            linear.row_operation(
                x[b].data_ptr(), y[b].data_ptr(), start, min(start + unit, last), add=add
            )
            for unit in [last - first if self.shape.batch == 1 else 4 * DECODE_ROWS]
            for start in range(first, last, unit)
            for b in range(self.shape.batch)
        ]

    def _activate(self, block: Block, thread: int) -> list[Operation]:
        opening = block.gate or block.up
        first, last = self._rows(opening, thread)
        if first >= last:
            return []
        round_size = activation.UNROLL * self.lanes
        count = -(-(last - first) // round_size) * activation.UNROLL
        name = self.stack.activation if block.gate is None else f"{self.stack.activation}_gate"
        gates, ups = self._gates[opening.rows], self._ups[opening.rows]
        return [
            activation.SIGNATURE.operation(
                name, x=gate.data_ptr() + 4 * first, y=up.data_ptr() + 4 * first, vectors=count
            )
            for gate, up in zip(gates, ups, strict=True)
        ]

    def _attend(self, index: int, block: Block, thread: int) -> list[Operation]:
        """For a thread's heads of keys and the queries that share them: all of attention."""
        stack, shape = self.stack, self.shape
        all_heads, key_heads = stack.heads_of(block)
        query_rows, key_rows = stack.rows_of(block)
        first, last = (round(key_heads * number / shape.threads) for number in (thread, thread + 1))
        if first == last:
            return []
        heads, dim = last - first, stack.head_dim
        group = all_heads // key_heads
        context = self._contexts[query_rows]
        found: list[Operation] = []
        for b in range(shape.batch):
            row = self._qkv[b].data_ptr()
            queries = row + 4 * first * group * dim
            keys = row + 4 * (query_rows + first * dim)
            values = keys + 4 * key_rows
            parts = ((queries, heads * group), (keys, heads))
            if block.head_norms is not None:
                for norm, (place, count) in zip(block.head_norms, parts, strict=True):
                    found.append(norm.operation("rms_norm_row", place, place, dim, count))
            if stack.rotary:
                cos, sin = (Slot(name, 4 * b * dim) for name in ("cos", "sin"))
                found += [
                    tiles.ROTARY.operation(
                        "rotary_row", x=place, heads=count, head_dim=dim, cos=cos, sin=sin
                    )
                    for place, count in parts
                ]
            table = self.tables[index, b].ctypes.data
            for place, offset in ((keys, 0), (values, key_rows)):
                found.append(
                    tiles.APPEND.operation(
                        "append",
                        x=place,
                        features=heads * dim,
                        tokens=1,
                        row_bytes=4,
                        table=table,
                        first=offset + first * dim,
                        position=Slot("past"),
                        width=self.width,
                    )
                )
            found.append(
                single_token.ATTENTION.operation(
                    "attention_row",
                    q=queries,
                    out=context[b].data_ptr() + 4 * first * group * dim,
                    heads=heads * group,
                    head_dim=dim,
                    k_first=first * dim,
                    v_first=key_rows + first * dim,
                    group=group,
                    table=table,
                    width=self.width,
                    mask=self.masks[b].data_ptr(),
                    key_count=Slot("past", 1),
                    window=block.window,
                    scores=self._scores[thread].data_ptr(),
                    scale=stack.scale,
                )
            )
        return found


def _padded(rows: int) -> int:
    """Features up to a whole unit: the most that a thread may write, and a kernel may read."""
    return -(-rows // DECODE_ROWS) * DECODE_ROWS
