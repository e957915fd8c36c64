"""Running a program of kernels on torch's own threads.

torch has loaded an OpenMP runtime. Its `GOMP_parallel` runs our worker in the pool that torch's
operations use, so there is no second pool and no core is asked for twice. Each thread interprets
its lists of operations; between phases they meet at a spinning barrier, which gives the core away
after a while, should another thread need it.

If the runtime gives fewer threads than asked for, each of them takes several lists.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from dataclasses import dataclass

from hf_sparse.runtime.ir import Function, Value
from hf_sparse.runtime.target import Target, is_x86

# Words of 8 bytes in an operation: the kernel's address and its arguments.
OPERATION_WORDS = 16
# Rounds of waiting at the barrier before the core is offered to others.
_PATIENCE = 4000

# The words of a program that the worker reads; `program.py` fills them in.
PHASES, LISTS, STARTS, OPERATIONS, BARRIER, THREAD_NUMBER, THREAD_COUNT, YIELD = range(8)
PROGRAM_WORDS = 8


def worker(target: Target, parallel: bool) -> Function:
    """What each thread runs. Argument: the address of a program's words.

    Args:
        target: what the code is for.
        parallel: ask OpenMP which thread this is; else it is the only one.
    """
    f = Function("worker" if parallel else "worker_alone", ("ptr program",), shared=("program",))
    program = f.parameters[0]

    def word(index: int, kind: str = "i64") -> Value:
        return program.at(8 * index).load(kind)

    thread, team = f.constant(0, "i64"), f.constant(1, "i64")
    if parallel:
        number = f.emit("i32", f"call i32 {word(THREAD_NUMBER, 'ptr').name}()")
        count = f.emit("i32", f"call i32 {word(THREAD_COUNT, 'ptr').name}()")
        thread, team = number.cast("zext", "i64"), count.cast("zext", "i64")
    phases, lists = word(PHASES), word(LISTS)
    starts, operations = word(STARTS, "ptr"), word(OPERATIONS, "ptr")
    barrier = word(BARRIER, "ptr")
    with f.range(phases) as phase:
        mine = f.variable(thread)
        with f.loop_while(lambda: mine.get().compare("lt", lists)):
            row = starts.at((phase * lists + mine.get()) * 8)
            with f.range(row.at(8).load("i64"), start=row.load("i64")) as index:
                operation = operations.at(index * (8 * OPERATION_WORDS))
                f.do(f"call void {operation.load('ptr').name}({operation.at(8)})")
            mine.set(mine.get() + team)
        if parallel:
            f.emit("i64", f"atomicrmw add {barrier}, i64 1 acq_rel")
            goal = (phase + 1) * team
            waited = f.variable(f.constant(0, "i64"))

            def early(barrier: Value = barrier, goal: Value = goal) -> Value:
                arrived = f.emit("i64", f"load atomic i64, {barrier} acquire, align 8")
                return arrived.compare("lt", goal)

            with f.loop_while(early):
                waited.set(waited.get() + 1)
                if is_x86():
                    f.declare("declare void @llvm.x86.sse2.pause()")
                    f.do("call void @llvm.x86.sse2.pause()")
                with f.when(waited.get().compare("gt", _PATIENCE)):
                    f.emit("i32", f"call i32 {word(YIELD, 'ptr').name}()")
    return f


@dataclass(frozen=True)
class OpenMP:
    """Addresses in the OpenMP runtime that torch uses."""

    parallel: int
    thread_number: int
    thread_count: int
    give_way: int


@functools.cache
def openmp() -> OpenMP | None:
    """The OpenMP runtime that this process has loaded, or None (and a warning) if there is none."""
    found = _loaded_runtime()
    if found is None:
        warnings.warn(
            "no OpenMP runtime is loaded in this process, so compiled models run on one thread. "
            "The builds of torch for Linux bring one.",
            stacklevel=2,
        )
        return None
    library, process = ctypes.CDLL(found), ctypes.CDLL(None)

    def address(library: ctypes.CDLL, symbol: str) -> int:
        return ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value or 0

    return OpenMP(
        address(library, "GOMP_parallel"),
        address(library, "omp_get_thread_num"),
        address(library, "omp_get_num_threads"),
        address(process, "sched_yield"),
    )


def _loaded_runtime() -> str | None:
    """The file of the loaded OpenMP runtime that torch brought."""
    if sys.platform != "linux":
        return None
    with open("/proc/self/maps") as maps:
        files = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
    named = sorted(f for f in files if any(n in f for n in ("libgomp", "libomp", "libiomp")))
    of_torch = [file for file in named if "torch" in file]
    return next(iter([*of_torch, *named]), None)
