"""How far kernels reach: what each call reads and writes, from its arguments.

A kernel declares its extents beside its code, as a function of a `Call`:

    def _extents(call):
        yield call.reads("x", 64 * call["vectors"])
        yield call.writes("y", 64 * call["vectors"])

What a kernel finds in memory, such as counts, columns and addresses of key tiles, is read by the
declaration, too, behind the extent that covers it. `checking.py` compares extents with buffers, and
the tests let every kernel run in buffers that have no byte more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class OutOfBoundsError(RuntimeError):
    """A kernel would read or write beyond the memory that is meant for it."""


@dataclass(frozen=True)
class Extent:
    """Bytes that a kernel touches.

    Attributes:
        pointer: the parameter that leads there; `keys` of tiles whose addresses a table has.
        address, nbytes: where they are, and how many.
        writes: it may write there; else it only reads.
    """

    pointer: str
    address: int
    nbytes: int
    writes: bool


class Call:
    """The arguments of one call of a kernel: integers and addresses, by the parameters' names."""

    def __init__(self, kernel: str, arguments: Mapping[str, int]) -> None:
        self.kernel, self._arguments = kernel, arguments

    def __getitem__(self, name: str) -> int:
        return self._arguments[name]

    def reads(self, pointer: str, nbytes: int, at: int = 0) -> Extent:
        """Read `nbytes` bytes, from `at` bytes behind a pointer on."""
        return Extent(pointer, self[pointer] + at, int(nbytes), False)

    def writes(self, pointer: str, nbytes: int, at: int = 0) -> Extent:
        """Write there, or read and write."""
        return Extent(pointer, self[pointer] + at, int(nbytes), True)

    def array(self, pointer: str, dtype: DTypeLike, count: int, at: int = 0) -> NDArray[Any]:
        """What lies `at` bytes behind a pointer; an extent that covers it was given before."""
        kind = np.dtype(dtype)
        content = ctypes.string_at(self[pointer] + at, max(int(count), 0) * kind.itemsize)
        return np.frombuffer(content, kind)

    def wants(self, holds: bool, what: str) -> None:
        """Refuse a call that does not keep what the kernel relies on.

        Raises:
            OutOfBoundsError: it does not hold.
        """
        if not holds:
            raise OutOfBoundsError(f"{self.kernel} wants {what}; it was called with {self}.")

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._arguments.items())


Extents = Callable[[Call], Iterator[Extent]]


def rounded_up(count: int, unit: int) -> int:
    """`count` up to a multiple of `unit`; 0 if it is negative."""
    return max(-(-count // unit), 0) * unit


def strided(rows: int, stride: int, last: int) -> int:
    """Bytes from the first of some rows to the end of the last one, which has `last` bytes."""
    return (rows - 1) * stride + last if rows > 0 and last > 0 else 0


def vectors(size: int, *names: str, reads: tuple[str, ...] = ()) -> Extents:
    """Of a kernel that changes as many vectors of `size` bytes at each pointer as `vectors` tells.

    Args:
        size: bytes of a vector.
        names: pointers that it writes to.
        reads: those that it only reads.
    """

    def extents(call: Call) -> Iterator[Extent]:
        for name in reads:
            yield call.reads(name, size * call["vectors"])
        for name in names:
            yield call.writes(name, size * call["vectors"])

    return extents


def rows_of_four(call: Call, rows: int) -> Iterator[Extent]:
    """What kernels for single tokens touch of y and bias: whole groups of four floats."""
    yield call.writes("y", 4 * rounded_up(rows, 4))
    if call["bias"]:
        yield call.reads("bias", 4 * rounded_up(rows, 4))
