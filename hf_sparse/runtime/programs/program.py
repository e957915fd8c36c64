"""A program: operations in phases, and the memory that they work in.

In each phase every thread has a list of operations (`kernels/call.py`); a phase begins when all
lists of the one before are done. `run` fills in the slots.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_sparse.runtime.kernels.call import Operation, write
from hf_sparse.runtime.kernels.worker import OPERATION_WORDS
from hf_sparse.runtime.llvm.jit import Code
from hf_sparse.runtime.programs import threads

# Bytes of the objects of a program, about.
_OBJECTS = 3 << 10


class Program:
    """Operations, ready to run. One call at a time: it has one set of buffers.

    Args:
        code: has the kernels and the worker.
        phases: for each phase, a list of operations per thread.
        memory: what the operations point into, kept alive.
    """

    def __init__(
        self, code: Code, phases: Sequence[Sequence[Sequence[Operation]]], memory: Sequence[object]
    ) -> None:
        self._code, self._memory = code, memory
        self.lists = len(phases[0])
        flat = [operation for phase in phases for part in phase for operation in part]
        counts = [len(part) for phase in phases for part in phase]
        self._operations = np.zeros((len(flat), OPERATION_WORDS), np.int64)
        slots: dict[str, list[tuple[int, int, int]]] = {}
        for row, operation in enumerate(flat):
            write(code, operation, self._operations[row])
            for place in operation.layout.slots:
                slot: Any = operation.arguments[place]
                slots.setdefault(slot.name, []).append((row, place + 1, slot.offset))
        self._slots = {
            name: tuple(np.array(column) for column in zip(*places, strict=True))
            for name, places in slots.items()
        }
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._barrier = np.zeros(16, np.int64)
        openmp = threads.openmp()
        self._parallel = openmp if self.lists > 1 else None
        told = [
            len(phases),
            self.lists,
            self._starts.ctypes.data,
            self._operations.ctypes.data,
            self._barrier.ctypes.data,
        ]
        if self._parallel:
            told += [
                self._parallel.thread_number,
                self._parallel.thread_count,
                self._parallel.give_way,
            ]
        self._words = np.array(told, np.int64)
        self._argument = np.array([self._words.ctypes.data], np.int64)
        name = "worker" if self._parallel else "worker_alone"
        self._worker = code.addresses[name]
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._worker)

    @property
    def nbytes(self) -> int:
        """Bytes of the operations, of what tells where the slots are, and of Python's objects."""
        slots = sum(column.nbytes for columns in self._slots.values() for column in columns)
        return self._operations.nbytes + slots + _OBJECTS

    def run(self, **addresses: int) -> None:
        """Run all phases.

        Args:
            addresses: fill the slots; more than there are slots for do no harm.

        Raises:
            TypeError: a slot is not filled.
        """
        for name, (rows, places, offsets) in self._slots.items():
            if name not in addresses:
                raise TypeError(f"nothing fills the slot {name}; given {', '.join(addresses)}.")
            self._operations[rows, places] = addresses[name] + offsets
        if self._parallel is None:
            self._alone(self._argument.ctypes.data)
            return
        self._barrier[0] = 0
        team = threads.team(self.lists)
        _gomp_parallel(self._parallel)(self._worker, self._argument.ctypes.data, team, 0)


def _gomp_parallel(openmp: threads.OpenMP):  # type: ignore[no-untyped-def]
    prototype = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    )
    return prototype(openmp.parallel)
