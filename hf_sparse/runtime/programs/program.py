"""A program: operations in phases, and the memory that they work in.

In each phase every thread has a list of operations (`kernels/call.py`); a phase begins when all
lists of the one before are done. `run` fills in the slots.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from hf_sparse.runtime.kernels import checking
from hf_sparse.runtime.kernels.call import Operation, write
from hf_sparse.runtime.kernels.worker import OPERATION_WORDS, TICKS, WAITS, name
from hf_sparse.runtime.llvm.jit import Code
from hf_sparse.runtime.programs import threads
from hf_sparse.runtime.programs.clocks import LISTENING, Clocks

# Bytes of the objects of a program, about.
_OBJECTS = 3 << 10


class Program:
    """Operations, ready to run. One call at a time: it has one set of buffers.

    Args:
        code: has the kernels and the worker.
        phases: for each phase, a list of operations per thread.
        memory: what the operations point into, kept alive. Kernels touch nothing else but what
            calls lend (`kernels/checking.py`).
    """

    def __init__(
        self, code: Code, phases: Sequence[Sequence[Sequence[Operation]]], memory: Sequence[object]
    ) -> None:
        self._code, self._memory = code, memory
        self.lists = len(phases[0])
        flat = [operation for phase in phases for part in phase for operation in part]
        counts = [len(part) for phase in phases for part in phase]
        self._kernels = [operation.kernel for operation in flat]
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
        self._checked = np.zeros(len(flat), bool)
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
            0,  # these two are for the timed worker
            0,
        ]
        if self._parallel:
            told += [
                self._parallel.thread_number,
                self._parallel.thread_count,
                self._parallel.give_way,
            ]
        self._words = np.array(told, np.int64)
        self._argument = np.array([self._words.ctypes.data], np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of the operations, of what tells where the slots are, and of Python's objects."""
        slots = sum(column.nbytes for columns in self._slots.values() for column in columns)
        return self._operations.nbytes + slots + 8 * len(self._kernels) + _OBJECTS

    def run(self, lent: Callable[[], Iterable[object]] = tuple, **addresses: int) -> None:
        """Run all phases.

        Args:
            lent: gives what lies behind the addresses, arrays and tensors: for HF_SPARSE_CHECK=1.
            addresses: fill the slots; more than there are slots for do no harm.

        Raises:
            TypeError: a slot is not filled.
            OutOfBoundsError: with HF_SPARSE_CHECK=1, an operation would leave its memory.
        """
        for slot, (rows, places, offsets) in self._slots.items():
            if slot not in addresses:
                raise TypeError(f"nothing fills the slot {slot}; given {', '.join(addresses)}.")
            self._operations[rows, places] = addresses[slot] + offsets
        if checking.is_asked_for():
            self._check(lent())
        clocks = LISTENING.get()
        if clocks is None:
            self._start(timed=False)
        else:
            self._run_timed(clocks)

    def _check(self, lent: Iterable[object]) -> None:
        """Compare with the memory all operations that were not yet, and those that have slots."""
        fresh = ~self._checked
        buffers = checking.Buffers([*self._memory, *lent])
        checking.check_words(self._code, self._operations[fresh], buffers)
        self._checked[:] = True
        for rows, _, _ in self._slots.values():
            self._checked[rows] = False

    def _start(self, *, timed: bool) -> None:
        """Run the worker on all threads, and wait for them."""
        worker = self._code.addresses[name(parallel=self._parallel is not None, timed=timed)]
        argument = self._argument.ctypes.data
        if self._parallel is None:
            _ALONE(worker)(argument)
            return
        self._barrier[0] = 0
        team = threads.team(self.lists)
        _gomp_parallel(self._parallel)(worker, argument, team, 0)

    def _run_timed(self, clocks: Clocks) -> None:
        """Run, and tell how long each operation and each thread's waits took."""
        team = threads.team(self.lists)
        ticks, waits = np.zeros(len(self._kernels), np.int64), np.zeros((team, 8), np.int64)
        self._words[[TICKS, WAITS]] = ticks.ctypes.data, waits.ctypes.data
        start = time.perf_counter()
        self._start(timed=True)
        seconds = time.perf_counter() - start
        lists = np.repeat(np.arange(len(self._starts) - 1) % self.lists, np.diff(self._starts))
        clocks.add(self._kernels, lists % team, ticks, waits[:, 0], seconds)


_ALONE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _gomp_parallel(openmp: threads.OpenMP):  # type: ignore[no-untyped-def]
    prototype = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    )
    return prototype(openmp.parallel)
