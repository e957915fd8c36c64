"""What follows from the buffers that steps read and write: waits, and memory that can be shared."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from hf_sparse.runtime.programs.step import Uses

# The part of a thread that reads what all threads have written.
ALL = "all"


class Use(NamedTuple):
    """How a step's threads divide some memory among them.

    Attributes:
        memory: which; equal for the same memory.
        part: how it is divided: a thread has the same part of it in all steps where this is equal.
        writes: it is changed.
    """

    memory: Hashable
    part: Hashable
    writes: bool


Item = TypeVar("Item")


def sections(steps: Iterable[Item], uses: Callable[[Item], Iterable[Use]]) -> list[list[Item]]:
    """Cut a row of steps where threads have to wait until all have done what comes before.

    A thread waits where it would need another one's part: some memory is divided otherwise than
    before, and one of the two steps changes it.
    """
    found: list[list[Item]] = [[]]
    since: dict[Hashable, set[tuple[Hashable, bool]]] = {}
    for step in steps:
        now = list(uses(step))
        if any(
            part != use.part and (writes or use.writes)
            for use in now
            for part, writes in since.get(use.memory, ())
        ):
            found.append([])
            since = {}
        found[-1].append(step)
        for use in now:
            since.setdefault(use.memory, set()).add((use.part, use.writes))
    return found


def needed_behind(steps: Sequence[Uses]) -> list[frozenset[str]]:
    """For each step, the names of the buffers whose content is read behind it."""
    needed: frozenset[str] = frozenset()
    parts = []
    for step in reversed(steps):
        parts.append(needed)
        needed = needed - {buffer.name for buffer in step.writes}
        needed |= {buffer.name for buffer in step.reads}
    return parts[::-1]


def apart(steps: Sequence[Uses]) -> set[tuple[str, str]]:
    """Pairs of buffers, in both orders, that need memory of their own.

    One is written while the other has content that is still to be read, or by the same step.
    """
    found: set[tuple[str, str]] = set()
    for step, needed in zip(steps, needed_behind(steps), strict=True):
        others = {buffer.name for buffer in (*step.reads, *step.writes)} | needed
        for buffer in step.writes:
            found |= {(buffer.name, other) for other in others if other != buffer.name}
    return found | {(other, one) for one, other in found}
