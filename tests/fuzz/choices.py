"""Choices read from bytes, so that chance, hypothesis and guided fuzzing all drive one mutator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """What to do next, as bytes tell; behind the last byte, always the first thing."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, below: int) -> int:
        """A number from 0 to `below - 1`."""
        size = max((below - 1).bit_length() + 7, 8) // 8
        taken = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(taken, "little") % max(below, 1)

    def pick(self, items: Sequence[T]) -> T:
        """One of some things."""
        return items[self.number(len(items))]

    def once_in(self, count: int) -> bool:
        """Whether something happens that does so once in `count` times; not behind the last byte."""
        return self._at < len(self._data) and self.number(count) == 0
