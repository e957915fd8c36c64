"""The memory of a program for one token of each sequence."""

from __future__ import annotations

from collections.abc import Iterable, Set

from torch import Tensor

from hf_sparse.runtime.programs.step import Buffer
from hf_sparse.runtime.weights.memory import aligned
from hf_sparse.runtime.weights.rows import DECODE_ROWS


class RowBuffers:
    """A vector of each sequence for every buffer of the steps.

    Kernels read and write a few features more than a vector has. So every vector has room behind it
    that is its own, and zeros stay there: a buffer that a weight reads is written by vectors of one
    size only, and blocks of another size (`hf_sparse.shrink_`) have another buffer.

    Args:
        buffers: of all blocks.
        own: those that each thread has for itself.
    """

    def __init__(
        self, buffers: Iterable[Buffer], own: Set[Buffer], batch: int, threads: int
    ) -> None:
        self.memory: dict[Buffer, Tensor] = {
            buffer: aligned(threads if buffer in own else 1, batch, _padded(buffer.features))
            for buffer in buffers
        }
        self._at = {
            buffer: [[row.data_ptr() for row in rows] for rows in memory]
            for buffer, memory in self.memory.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(memory.nbytes for memory in self.memory.values())

    @property
    def rows(self) -> list[Tensor]:
        """The memory of every vector."""
        return [row for memory in self.memory.values() for part in memory for row in part]

    def of(self, buffer: Buffer, thread: int) -> list[int]:
        """The address of each sequence's vector, as a thread sees it."""
        places = self._at[buffer]
        return places[thread] if len(places) > 1 else places[0]


def _padded(features: int) -> int:
    """Features up to a whole unit: the most that a thread may write, and a kernel may read."""
    return -(-features // DECODE_ROWS) * DECODE_ROWS
