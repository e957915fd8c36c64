"""Programs that wait for the next call of their shape."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar


class HasBytes(Protocol):
    """Anything whose memory is counted."""

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""


Item = TypeVar("Item", bound=HasBytes)


class Pool(Generic[Item]):
    """Keeps what was used last, up to `limit` bytes; each item serves one call at a time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._idle: OrderedDict[Hashable, list[Item]] = OrderedDict()

    @contextmanager
    def borrow(self, key: Hashable, make: Callable[[], Item]) -> Iterator[Item]:
        """An item for `key` that no one else has, made if there is none."""
        with self._lock:
            idle = self._idle.get(key)
            item = idle.pop() if idle else None
        if item is None:
            item = make()
        try:
            yield item
        finally:
            with self._lock:
                self._idle.setdefault(key, []).append(item)
                self._idle.move_to_end(key)
                self._forget()

    def _forget(self) -> None:
        """Drop the items that were not used for longest, but never the last one."""
        kept = [(key, item) for key, items in self._idle.items() for item in items]
        size = sum(item.nbytes for _, item in kept)
        for key, item in kept[:-1]:
            if size <= self._limit:
                break
            self._idle[key].remove(item)
            size -= item.nbytes
            if not self._idle[key]:
                del self._idle[key]
