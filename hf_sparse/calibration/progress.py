"""Progress bars: one for each loop, or a single one over all stages of a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from transformers.utils.logging import is_progress_bar_enabled, tqdm

_Item = TypeVar("_Item")
_WHOLE: ContextVar[WholeRun | _Silence | None] = ContextVar("hf_sparse_whole_run", default=None)


def steps(items: Sequence[_Item], description: str) -> Iterator[_Item]:
    """The items, with a progress bar of their own, or as a part of a whole run's bar.

    Args:
        items: of a loop.
        description: what is done to them.
    """
    whole = _WHOLE.get()
    if whole is None:
        yield from tqdm(items, desc=description)
        return
    with whole.part(description) as done:
        for number, item in enumerate(items, start=1):
            yield item
            done(number / len(items))


def announce(text: str) -> None:
    """Tell on stderr what is about to begin, where progress bars are shown."""
    if is_progress_bar_enabled():
        print(text, file=sys.stderr, flush=True)


@contextmanager
def silent() -> Iterator[None]:
    """No progress bars of loops: what runs is a short measurement."""
    token = _WHOLE.set(_Silence())
    try:
        yield
    finally:
        _WHOLE.reset(token)


class _Silence:
    """A whole run that shows nothing."""

    @contextmanager
    def part(self, description: str) -> Iterator[Any]:
        yield lambda share: None


class WholeRun:
    """One progress bar over a run of several loops, in seconds as they are estimated.

    Args:
        description: of the run.
        total: the estimated seconds of all its stages.
    """

    def __init__(self, description: str, total: float) -> None:
        self._bar: Any = tqdm(
            total=total,
            desc=description,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} (estimated {total:.0f} s){postfix}",
        )
        self._total, self._shown, self._done = total, 0.0, 0.0
        self._parts: list[float] = []
        self._end = 0.0

    @contextmanager
    def stage(self, name: str, parts: Sequence[float]) -> Iterator[None]:
        """A stage of the run.

        Args:
            name: of the stage.
            parts: the estimated seconds of each of its loops, in order.
        """
        self._parts, self._end = list(parts), self._done + sum(parts)
        self._bar.set_postfix_str(f" {name}")
        token = _WHOLE.set(self)
        try:
            yield
        finally:
            _WHOLE.reset(token)
        self._to(self._end)
        self._done = self._end

    @contextmanager
    def part(self, description: str) -> Iterator[Any]:
        """The next loop of the stage; what it yields is told the share that is done."""
        seconds = self._parts.pop(0) if self._parts else 0.0
        start = self._done
        yield lambda share: self._to(start + share * seconds)
        self._done = min(start + seconds, self._end)

    def skip(self, seconds: float) -> None:
        """A stage that an earlier run has done."""
        self._done += seconds
        self._to(self._done)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()

    def _to(self, seconds: float) -> None:
        reached = min(max(seconds, self._shown), self._total)
        self._bar.update(reached - self._shown)
        self._shown = reached
