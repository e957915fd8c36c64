"""Calls of kernels compared with the memory that is there: for tests, as it costs time.

With the environment variable HF_SPARSE_CHECK=1 every program compares what its operations would read
and write (`extents.py`) with the arrays and tensors that were handed over, before machine code runs.
The operations are read as machine code finds them: as words in memory, with those that `when` runs.
"""

from __future__ import annotations

import functools
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_sparse.runtime.kernels.extents import Call, Extent, OutOfBoundsError
from hf_sparse.runtime.kernels.worker import OPERATION_WORDS
from hf_sparse.runtime.llvm.jit import Code

_OURS = "hf_sparse."


def is_asked_for() -> bool:
    """Whether HF_SPARSE_CHECK is 1."""
    return os.environ.get("HF_SPARSE_CHECK") == "1"


class Buffers:
    """The memory of arrays and tensors, those inside of other objects included.

    Views of one memory are one buffer; what only lies side by side is not.

    Args:
        objects: arrays, tensors, or objects of this package and containers that hold some.
    """

    def __init__(self, objects: Iterable[object]) -> None:
        found = sorted(set(_spans(objects)))
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in found:
            if self._ends and start < self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(start)
                self._ends.append(end)

    def room(self, address: int) -> int:
        """Bytes from an address to the end of its buffer; 0 outside of all."""
        place = bisect_right(self._starts, address) - 1
        return max(self._ends[place] - address, 0) if place >= 0 else 0


def _spans(objects: Iterable[object]) -> Iterator[tuple[int, int]]:
    pending, seen = list(objects), dict[int, object]()
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if isinstance(one, np.ndarray):
            start, end = np.lib.array_utils.byte_bounds(one)
            if one.size:
                yield start, end
        elif isinstance(one, torch.Tensor):
            if one.numel() and one.device.type == "cpu":
                strides = zip(one.shape, one.stride(), strict=True)
                last = sum((size - 1) * stride for size, stride in strides)
                yield one.data_ptr(), one.data_ptr() + (last + 1) * one.element_size()
        elif isinstance(one, dict):
            pending.extend(one.values())
        elif isinstance(one, list | tuple | set):
            pending.extend(one)
        elif type(one).__module__.startswith(_OURS):
            pending.extend(getattr(one, "__dict__", {}).values())


def check_words(code: Code, operations: NDArray[np.int64], buffers: Buffers) -> None:
    """Compare operations, `(count, words)` as machine code reads them, with buffers.

    Raises:
        OutOfBoundsError: one would read or write beyond a buffer.
    """
    names = _names(code)
    for words in operations.tolist():
        name = names[words[0]]
        check(code, Call(name, _arguments(code.parameters[name], words[1:])), buffers)


def check(code: Code, call: Call, buffers: Buffers) -> None:
    """Compare one call with buffers, and what it runs itself.

    Raises:
        OutOfBoundsError: it would read or write beyond a buffer.
    """
    extents = code.extents[call.kernel]
    assert extents is not None
    for extent in extents(call):
        _check(call, extent, buffers)
    if call.kernel == "when":
        inner = call.array("operations", np.int64, OPERATION_WORDS * call["number"])
        check_words(code, inner.reshape(-1, OPERATION_WORDS), buffers)


def _check(call: Call, extent: Extent, buffers: Buffers) -> None:
    if extent.nbytes < 0:
        raise OutOfBoundsError(f"{call.kernel} was called with {call}: a size under 0.")
    room = buffers.room(extent.address)
    if extent.nbytes > room:
        does = "write" if extent.writes else "read"
        there = f"{room} bytes there belong to its memory" if room else "its memory is not there"
        raise OutOfBoundsError(
            f"{call.kernel} would {does} {extent.nbytes} bytes by {extent.pointer} at "
            f"{extent.address:#x}; {there}. It was called with {call}."
        )


def _arguments(parameters: tuple[str, ...], words: list[int]) -> dict[str, int]:
    split = (parameter.split() for parameter in parameters)
    return {name: word for (kind, name), word in zip(split, words, strict=False) if kind != "float"}


@functools.lru_cache(maxsize=64)
def _names(code: Code) -> dict[int, Any]:
    return {address: name for name, address in code.addresses.items()}
