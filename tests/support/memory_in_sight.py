"""The arrays that the running functions know, and copies of them at other addresses.

Operations hold bare addresses. To run one in another process, the memory behind them must be found:
it belongs to an array or tensor that a function on the stack still holds, by itself or through its
objects, or that a cached function keeps.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType, MethodType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_PAGE, _LINE = 4096, 64
_CACHED = type(functools.cache(lambda: None))
_OURS = ("hf_sparse.", "tests.")


@dataclass(frozen=True)
class Block:
    """Memory of one array, or of arrays that overlap.

    Attributes:
        start: its address.
        words: whether it holds numbers of 64 bits, some of which are addresses.
    """

    start: int
    nbytes: int
    words: bool

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.start + self.nbytes

    def memory(self) -> NDArray[np.uint8]:
        """What is there, to be read and written."""
        room = (ctypes.c_uint8 * self.nbytes).from_address(self.start)
        return np.frombuffer(memoryview(room), np.uint8)


def blocks_in_sight(frame: FrameType | None) -> Sight:
    """All memory of arrays that this package's and the tests' functions on the stack know."""
    pending: list[Any] = []
    for name in [name for name in sys.modules if name.startswith("hf_sparse.runtime.weights.")]:
        for one in vars(sys.modules[name]).values():
            if isinstance(one, _CACHED):
                pending.extend(gc.get_referents(one))
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(_OURS):
            pending.extend(frame.f_locals.values())
            plain = np.ndarray | torch.Tensor
            pending.extend(one for one in frame.f_globals.values() if isinstance(one, plain))
        frame = frame.f_back
    seen: dict[int, Any] = {}  # kept alive, so that no number names two objects
    found = []
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if isinstance(one, np.ndarray | torch.Tensor):
            found.append(_block(one))
        else:
            pending.extend(_parts(one))
    return Sight(_merged(block for block in found if block is not None))


def _parts(one: object) -> Iterator[Any]:
    if isinstance(one, dict):
        yield from one.values()
    elif isinstance(one, list | tuple | set):
        yield from one
    elif isinstance(one, functools.partial):
        yield from (one.func, *one.args, *one.keywords.values())
    elif isinstance(one, MethodType):
        yield one.__self__
    elif closure := getattr(one, "__closure__", None):
        yield from (cell.cell_contents for cell in closure if cell != type(cell)())
    elif type(one).__module__.startswith(_OURS) or isinstance(one, torch.nn.Module):
        yield from getattr(one, "__dict__", {}).values()
        for name in getattr(type(one), "__slots__", ()):
            yield getattr(one, name, None)


def _block(array: NDArray[Any] | torch.Tensor) -> Block | None:
    """The bytes from the first element to the last one."""
    if isinstance(array, torch.Tensor):
        if array.device.type != "cpu" or array.layout != torch.strided:
            return None
        size, start, words = array.element_size(), array.data_ptr(), False
        steps = [step * size for step in array.stride()]
    else:
        size, start, words = array.itemsize, array.ctypes.data, array.dtype == np.int64
        steps = list(array.strides)
    if not np.prod(array.shape) or not start or min(steps, default=0) < 0:
        return None
    last = sum((n - 1) * step for n, step in zip(array.shape, steps, strict=True))
    return Block(start, last + size, bool(words))


def _merged(blocks: Iterable[Block]) -> list[Block]:
    found: list[Block] = []
    for block in sorted(blocks, key=lambda block: block.start):
        if found and block.start < found[-1].end:
            last = found.pop()
            end = max(last.end, block.end)
            block = Block(last.start, end - last.start, last.words or block.words)
        found.append(block)
    return found


class Sight:
    """Blocks that do not overlap, in order."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self._starts = np.array([block.start for block in blocks], np.int64)
        self._ends = np.array([block.end for block in blocks], np.int64)

    def knows(self, pointer: int) -> bool:
        """Whether an address lies in a block, or right behind it."""
        return bool(_located(self._starts, self._ends, np.array([pointer]))[1][0])

    def reached(self, pointers: Iterable[int]) -> list[Block]:
        """The blocks in which these addresses lie, or those that are written in them."""
        pending, found = list(pointers), set[int]()
        while pending:
            numbers, inside = _located(self._starts, self._ends, np.array(pending, np.int64))
            fresh = set(numbers[inside].tolist()) - found
            found |= fresh
            pending = []
            for number in fresh:
                if self.blocks[number].words:
                    pending += self.blocks[number].memory().view(np.int64).tolist()
        return [self.blocks[number] for number in sorted(found)]


def _located(
    starts: NDArray[np.int64], ends: NDArray[np.int64], words: NDArray[np.int64]
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """For each word the block in which it may be an address, and whether it is; ends belong to it."""
    numbers = np.searchsorted(starts, words, side="right") - 1
    return numbers, (numbers >= 0) & (words <= ends[numbers])


def _pattern(number: int, pages: int) -> NDArray[np.uint8]:
    """What is around a copy: signalling NaN, which sums, and copies from elsewhere, do not leave."""
    random = np.random.default_rng(number)
    words = random.integers(0x7F800001, 0x7FBFFFFF, pages * _PAGE // 4, np.uint32)
    return words.view(np.uint8)


class Image:
    """Copies of blocks for other addresses, each in pages of its own, close to the end of the last.

    Args:
        blocks: that do not overlap, in order.
        base: the address of the first page. A page stays free before each copy's.
        functions: addresses of functions here and there.
    """

    def __init__(self, blocks: Sequence[Block], base: int, functions: dict[int, int]) -> None:
        self.blocks, self._functions = blocks, functions
        self.pieces: list[tuple[int, NDArray[np.uint8]]] = []
        self._places: list[int] = []
        for block in blocks:
            base += _PAGE
            pages = -(-(block.nbytes + _LINE) // _PAGE)
            room = pages * _PAGE - block.nbytes
            self._places.append(room - (room - block.start) % _LINE)
            self.pieces.append((base, _pattern(len(self.pieces), pages)))
            base += pages * _PAGE
        self.end = base
        self._starts = np.array([block.start for block in blocks], np.int64)
        self._ends = np.array([block.end for block in blocks], np.int64)
        shifts = [
            start + place - block.start
            for block, place, (start, _) in zip(blocks, self._places, self.pieces, strict=True)
        ]
        self._shifts = np.array(shifts, np.int64)
        for number, block in enumerate(blocks):
            memory = block.memory()
            self.content(number)[:] = (
                self.translated(memory.view(np.int64)).view(np.uint8) if block.words else memory
            )

    def content(self, number: int) -> NDArray[np.uint8]:
        """The copy of a block."""
        place = self._places[number]
        return self.pieces[number][1][place : place + self.blocks[number].nbytes]

    def translated(self, words: NDArray[np.int64]) -> NDArray[np.int64]:
        """Words with the addresses of blocks and functions replaced."""
        numbers, inside = _located(self._starts, self._ends, words)
        result = np.where(inside, words + self._shifts[numbers], words)
        for here, there in self._functions.items():
            result[words == here] = there
        return result

    def damaged(self) -> list[str]:
        """What was written outside of the copies."""
        found = []
        for number, (block, place) in enumerate(zip(self.blocks, self._places, strict=True)):
            page = self.pieces[number][1]
            wrong = np.flatnonzero(page != _pattern(number, len(page) // _PAGE)) - place
            for at in wrong[(wrong < 0) | (wrong >= block.nbytes)].tolist()[:1]:
                found.append(f"byte {at} of the {block.nbytes} at {block.start:#x} was written")
        return found

    def written(self, number: int) -> NDArray[np.int64]:
        """Places and values of the words of a block that are others than before."""
        before = self.translated(self.blocks[number].memory().view(np.int64))
        now = self.content(number).view(np.int64)
        (places,) = np.nonzero(now != before)
        return np.stack([places, now[places]])

    def take_back(self) -> None:
        """Write the copies where they came from, without the words that stayed the same."""
        for number, block in enumerate(self.blocks):
            if block.words:
                places, values = self.written(number)
                block.memory().view(np.int64)[places] = values
            else:
                block.memory()[:] = self.content(number)
