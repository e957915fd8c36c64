"""Which heads a thread has, where a vector holds the queries, keys and values of all; rotated heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hf_sparse.runtime.programs.step import Buffer, Heads


@dataclass(frozen=True)
class HeadPart:
    """A thread's heads of keys, and the queries that share them.

    Attributes:
        first, keys: the first of its heads of keys, and how many it has.
        queries: heads of queries.
        queries_at, keys_at, values_at: addresses.
    """

    first: int
    keys: int
    queries: int
    queries_at: int
    keys_at: int
    values_at: int

    @classmethod
    def of(cls, heads: Heads, thread: int, threads: int, at: int) -> HeadPart:
        """The part of `thread` in a vector at the address `at`."""
        first, last = (round(heads.keys * number / threads) for number in (thread, thread + 1))
        queries_at = at + 4 * first * heads.group * heads.dim
        keys_at = at + 4 * (heads.query_rows + first * heads.dim)
        keys, values_at = last - first, keys_at + 4 * heads.key_rows
        return cls(first, keys, keys * heads.group, queries_at, keys_at, values_at)

    @property
    def turned(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where queries and keys are, and how many heads of each."""
        return (self.queries_at, self.queries), (self.keys_at, self.keys)


def rotated_at_once(heads: int, dim: int, cos: Buffer) -> Iterator[tuple[int, int]]:
    """A kernel turns whole heads, so it takes all of them, or the first features of each by itself.

    Yields:
        The first head of each call, and how many it turns.
    """
    if cos.features == dim:
        yield 0, heads
    else:
        yield from ((head, 1) for head in range(heads))
