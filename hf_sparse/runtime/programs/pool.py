"""Programs that wait for the next call of their shape."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

# Bytes of programs and buffers that a model keeps for later calls of the same shape.
KEPT_BYTES = 128 << 20


class HasBytes(Protocol):
    """Anything whose memory is counted."""

    @property
    def nbytes(self) -> int:
        """Bytes of its memory; never changes."""


Item = TypeVar("Item", bound=HasBytes)


class Pool(Generic[Item]):
    """Keeps what was used last, up to `limit` bytes; each item serves one call at a time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._lock = threading.Lock()
        self._idle: OrderedDict[Hashable, list[Item]] = OrderedDict()

    @contextmanager
    def borrow(self, key: Hashable, make: Callable[[], Item]) -> Iterator[Item]:
        """An item for `key` that no one else has, made if there is none."""
        with self._lock:
            idle = self._idle.get(key)
            item = idle.pop() if idle else None
            if item is not None:
                self._size -= item.nbytes
        if item is None:
            item = make()
        try:
            yield item
        finally:
            with self._lock:
                self._idle.setdefault(key, []).append(item)
                self._idle.move_to_end(key)
                self._size += item.nbytes
                self._forget()

    def _forget(self) -> None:
        """Drop the items that were not used for longest, but never the last one."""
        while self._size > self._limit:
            key, items = next(iter(self._idle.items()))
            if len(items) == 1 == len(self._idle):
                break
            if items:
                self._size -= items.pop(0).nbytes
            if not items:
                del self._idle[key]

    @property
    def nbytes(self) -> int:
        """Bytes of all items that wait."""
        return self._size
