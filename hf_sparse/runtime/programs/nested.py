"""Lists of operations that other operations run, or do not run (`kernels/experts.py`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from hf_sparse.runtime.kernels.call import Operation, write
from hf_sparse.runtime.kernels.worker import OPERATION_WORDS
from hf_sparse.runtime.llvm.jit import Code


class Nested:
    """Keeps lists of operations in memory, as machine code reads them.

    Args:
        code: has the kernels.
    """

    def __init__(self, code: Code) -> None:
        self._code = code
        self.memory: list[NDArray[np.int64]] = []
        self._shared: dict[Hashable, tuple[int, int]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all lists."""
        return sum(memory.nbytes for memory in self.memory)

    def shared(self, key: Hashable, make: Callable[[], Sequence[Operation]]) -> tuple[int, int]:
        """Address and length of the list for a key, which is made when it is first asked for."""
        if key not in self._shared:
            operations = make()
            self._shared[key] = self.place(operations), len(operations)
        return self._shared[key]

    def place(self, operations: Sequence[Operation]) -> int:
        """The address of a list of operations, none of which has slots.

        Raises:
            TypeError: one has slots, which only programs fill.
        """
        memory = np.zeros((len(operations), OPERATION_WORDS), np.int64)
        for row, operation in zip(memory, operations, strict=True):
            if operation.layout.slots:
                raise TypeError(f"{operation.kernel} has slots: it cannot be in a list in a list.")
            write(self._code, operation, row)
        self.memory.append(memory)
        return int(memory.ctypes.data)
