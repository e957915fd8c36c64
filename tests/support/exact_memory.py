"""Calls of kernels in memory that has not a byte more than they declare to need."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hf_sparse.runtime.kernels.call import Operation, run
from hf_sparse.runtime.kernels.extents import Call, Extent
from hf_sparse.runtime.llvm.jit import Code
from tests.support.guarded_memory import between_guards, protect
from tests.support.kernel_calls import Example

_PAGE = mmap.PAGESIZE


@dataclass
class _Hull:
    """The memory between the first and the last byte of some extents."""

    start: int
    end: int
    writes: bool
    shift: int = 0

    def overlaps(self, other: _Hull) -> bool:
        return self.start < other.end and other.start < self.end


def _hull(extents: Sequence[Extent]) -> _Hull | None:
    kept = [extent for extent in extents if extent.nbytes > 0]
    if not kept:
        return None
    return _Hull(
        min(extent.address for extent in kept),
        max(extent.address + extent.nbytes for extent in kept),
        any(extent.writes for extent in kept),
    )


def call_of(operation: Operation) -> Call:
    """The integers and addresses of an operation without slots."""
    names = [parameter.split()[1] for parameter in operation.parameters]
    pairs = zip(names, operation.arguments, strict=True)
    given = {name: value for name, value in pairs if isinstance(value, int)}
    return Call(operation.kernel, given)


def pointers_of(code: Code, example: Example) -> list[str]:
    """The pointers by which a call touches memory."""
    extents = code.extents[example.operation.kernel]
    assert extents is not None
    touched = {extent.pointer for extent in extents(call_of(example.operation)) if extent.nbytes}
    return sorted(touched)


def run_exactly(code: Code, example: Example, *, at_end: bool, short: str = "") -> None:
    """Run an example in copies of its memory: what it only reads cannot be written.

    Args:
        code: has the kernel.
        example: the call.
        at_end: memory ends at a page that cannot be touched; else it begins behind one.
        short: a pointer, or `keys`, whose last 64 bytes, or all if there are fewer, are on that page.
    """
    operation = example.operation
    call = call_of(operation)
    declared = code.extents[operation.kernel]
    assert declared is not None
    extents = list(declared(call))
    hulls: dict[str, _Hull] = {}
    for name in dict.fromkeys(extent.pointer for extent in extents):
        hull = _hull([extent for extent in extents if extent.pointer == name])
        if hull is not None and name != "keys":
            hulls[name] = hull
    for number, tile in enumerate(example.tiles):
        start = tile.ctypes.data
        inside = [e for e in extents if start <= e.address < start + tile.nbytes]
        hull = _hull([extent for extent in inside if extent.pointer == "keys"])
        if hull is not None:
            hulls[f"tile {number}"] = hull
    _join(hulls)
    for name, hull in hulls.items():
        is_short = name == short or (short == "keys" and name.startswith("tile "))
        _copy(hull, at_end=at_end, missing=64 if is_short else 0)
    if "table" in hulls:
        _rewrite(example, call, hulls)
    nowhere = between_guards(_PAGE) + _PAGE
    arguments = list(operation.arguments)
    for place, parameter in enumerate(operation.parameters):
        kind, name = parameter.split()
        if kind != "ptr" or not arguments[place]:
            continue
        moved = hulls.get(name)
        arguments[place] = nowhere if moved is None else call[name] + moved.shift
    run(code, replace(operation, arguments=tuple(arguments)))


def _join(hulls: dict[str, _Hull]) -> None:
    """Pointers into the same memory move together."""
    names = list(hulls)
    for i, one in enumerate(names):
        for other in names[:i]:
            a, b = hulls[one], hulls[other]
            if a is not b and a.overlaps(b):
                both = _Hull(min(a.start, b.start), max(a.end, b.end), a.writes or b.writes)
                for name in names:
                    if hulls[name] is a or hulls[name] is b:
                        hulls[name] = both


def _copy(hull: _Hull, *, at_end: bool, missing: int) -> None:
    if hull.shift:
        return
    nbytes = hull.end - hull.start
    body = -(-nbytes // _PAGE) * _PAGE
    base = between_guards(body)
    start = base + body - nbytes + missing if at_end else base
    kept = max(nbytes - missing, 0)
    if kept:
        ctypes.memmove(start, hull.start, kept)
    hull.shift = start - hull.start
    if not hull.writes:
        assert protect(base, body, mmap.PROT_READ)


def _rewrite(example: Example, call: Call, hulls: dict[str, _Hull]) -> None:
    """Let the table's copy tell where the copies of key tiles are."""
    moved = hulls["table"]
    known = {tile.ctypes.data: f"tile {number}" for number, tile in enumerate(example.tiles)}
    room = mmap.PROT_READ | mmap.PROT_WRITE
    first = (moved.start + moved.shift) // _PAGE * _PAGE
    size = -(-(moved.end + moved.shift - first) // _PAGE) * _PAGE
    assert protect(first, size, room)
    for word in range(moved.start + moved.shift, moved.end + moved.shift - 7, 8):
        place = ctypes.c_int64.from_address(word)
        name = known.get(place.value)
        if name in hulls:
            place.value += hulls[name].shift
    assert protect(first, size, mmap.PROT_READ)


def died(work: Callable[[np.ndarray], None]) -> tuple[str, int]:
    """Run something in a process of its own.

    Args:
        work: takes an array of one number, that this process sees, too.

    Returns:
        The signal that ended it, or "" if it came to its end, and the number.
    """
    shared = mmap.mmap(-1, _PAGE)
    number = np.frombuffer(shared, np.int64, 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(number)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    found = int(number[0])
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name, found
    return "" if os.WEXITSTATUS(status) == 0 else "an error", found
