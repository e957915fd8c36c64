"""What each thread of a program runs: its lists of operations, phase by phase.

Between phases the threads meet at a spinning barrier, which gives the core away after a while,
should another thread need it. There are no more threads than cores (`programs/threads.py`), and OpenMP
may give fewer: with more lists than threads, each of them takes several.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value

# Words of 8 bytes in an operation: the kernel's address and its arguments.
OPERATION_WORDS = 16
# Rounds of waiting at the barrier before the core is offered to others.
_PATIENCE = 4000

# The words of a program that the worker reads; `programs/program.py` fills them in. The last two are
# for the timed worker: where it adds the ticks of each operation, and those that each thread waits.
PHASES, LISTS, STARTS, OPERATIONS, BARRIER, TICKS, WAITS = range(7)
THREAD_NUMBER, THREAD_COUNT, YIELD = range(7, 10)


def name(*, parallel: bool, timed: bool) -> str:
    """The symbol of a worker."""
    return f"worker{'' if parallel else '_alone'}{'_timed' if timed else ''}"


def worker(target: Target, *, parallel: bool, timed: bool = False) -> Function:
    """What each thread runs. Argument: the address of a program's words.

    Args:
        target: what the code is for.
        parallel: ask OpenMP which thread this is; else it is the only one.
        timed: read the clock before and behind every operation and every wait.
    """
    f = Function(name(parallel=parallel, timed=timed), ("ptr program",), shared=("program",))
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
    with f.range(phases) as phase:
        mine = f.variable(thread)
        with f.loop_while(lambda: mine.get().compare("lt", lists)):
            row = starts.at((phase * lists + mine.get()) * 8)
            with f.range(row.at(8).load("i64"), start=row.load("i64")) as index:
                operation = operations.at(index * (8 * OPERATION_WORDS))
                with _ticks(f, target, timed, program.at(8 * TICKS), index * 8):
                    f.do(f"call void {operation.load('ptr').name}({operation.at(8)})")
            mine.set(mine.get() + team)
        if parallel:
            with _ticks(f, target, timed, program.at(8 * WAITS), thread * 64):
                _meet(f, target, word(BARRIER, "ptr"), (phase + 1) * team, word(YIELD, "ptr"))
    return f


@contextmanager
def _ticks(f: Function, target: Target, timed: bool, table: Value, offset: Value) -> Iterator[None]:
    """Add the ticks that something takes to the number `offset` bytes behind where a table is."""
    if not timed:
        yield
        return
    f.declare(f"declare i64 @{target.has.clock}()")
    begun = f.emit("i64", f"call i64 @{target.has.clock}()")
    yield
    spent = f.emit("i64", f"call i64 @{target.has.clock}()") - begun
    place = table.load("ptr").at(offset)
    place.store(place.load("i64") + spent)


def _meet(f: Function, target: Target, barrier: Value, goal: Value, offer: Value) -> None:
    """Wait until all threads have come here so often that the barrier's count is `goal`."""
    f.emit("i64", f"atomicrmw add {barrier}, i64 1 acq_rel")
    waited = f.variable(f.constant(0, "i64"))

    def early() -> Value:
        arrived = f.emit("i64", f"load atomic i64, {barrier} acquire, align 8")
        return arrived.compare("lt", goal)

    with f.loop_while(early):
        waited.set(waited.get() + 1)
        if target.has.pause:
            f.declare(f"declare void @{target.has.pause}()")
            f.do(f"call void @{target.has.pause}()")
        with f.when(waited.get().compare("gt", _PATIENCE)):
            f.emit("i32", f"call i32 {offer.name}()")
