"""Timing the operations of programs inside real calls: `with listening() as clocks: model(...)`.

The timed worker (`kernels/worker.py`) reads the CPU's clock around every operation and every wait. Its
ticks become seconds by the time that Python measures for the same run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class Clocks:
    """Seconds of all programs that ran meanwhile.

    Attributes:
        kernels: of each kernel, by thread.
        waits: at barriers, by thread.
        programs: of whole programs, as Python sees them.
        runs: how many there were.
    """

    kernels: dict[str, dict[int, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )
    waits: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    programs: float = 0.0
    runs: int = 0

    def add(
        self,
        names: Sequence[str],
        threads: NDArray[np.int64],
        ticks: NDArray[np.int64],
        waits: NDArray[np.int64],
        seconds: float,
    ) -> None:
        """Add one run.

        Args:
            names, threads, ticks: of each operation.
            waits: ticks of each thread.
            seconds: of the run.
        """
        spent = {t: int(ticks[threads == t].sum() + wait) for t, wait in enumerate(waits)}
        # The thread that has most to do, or waits, is busy from the beginning to the end.
        second = seconds / max(max(spent.values(), default=0), 1)
        for name, thread, count in zip(names, threads.tolist(), ticks.tolist(), strict=True):
            self.kernels[name][thread] += count * second
        for thread, count in enumerate(waits.tolist()):
            self.waits[thread] += count * second
        self.programs += seconds
        self.runs += 1


LISTENING: ContextVar[Clocks | None] = ContextVar("clocks", default=None)


@contextmanager
def listening() -> Iterator[Clocks]:
    """Time all programs that this thread runs meanwhile."""
    clocks = Clocks()
    token = LISTENING.set(clocks)
    try:
        yield clocks
    finally:
        LISTENING.reset(token)
