"""Memory that begins at cache lines, and memory for packed weights that lies together."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

# Rows of tiles, and streams of weights, begin at cache lines.
ALIGNMENT = 64


def aligned(*shape: int) -> torch.Tensor:
    """Zeros, float32, that begin at a cache line."""
    count = int(np.prod(shape))
    # Whatever torch's default type and device are, and usable within inference mode and outside.
    with torch.inference_mode(False):
        memory = torch.zeros(count + ALIGNMENT // 4, dtype=torch.float32, device="cpu")
    skip = (-memory.data_ptr() % ALIGNMENT) // 4
    return memory[skip : skip + count].view(shape)


class Shelf:
    """Puts arrays side by side, in the order in which they are read, into large pieces of memory.

    numpy asks for huge pages where it allocates megabytes: one page table entry for 2 MB of weights
    in place of 512, which matters when all weights are read once for every token.
    """

    def __init__(self, piece: int = 64 << 20) -> None:
        self._piece = piece
        self._memory = np.empty(0, np.uint8)
        self._used = 0

    def place(self, array: NDArray) -> NDArray:
        """A copy of `array` on the shelf."""
        placed = self.room(array.nbytes).view(array.dtype).reshape(array.shape)
        placed[...] = array
        return placed

    def room(self, nbytes: int) -> NDArray[np.uint8]:
        """The next `nbytes` bytes, to be written."""
        if self._used + nbytes + ALIGNMENT > len(self._memory):
            self._memory = np.empty(max(self._piece, nbytes + ALIGNMENT), np.uint8)
            self._used = -self._memory.ctypes.data % ALIGNMENT
        room = self._memory[self._used : self._used + nbytes]
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return room
