"""Progress bars and logs of other libraries, while a command runs."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    get_verbosity,
    is_progress_bar_enabled,
    set_verbosity,
    set_verbosity_info,
)

from hf_sparse_cli.messages import has

# Loggers with handlers of their own; what others log goes to the handler of last resort.
_LIBRARIES = ("transformers", "huggingface_hub")


@contextmanager
def messages(options: argparse.Namespace) -> Iterator[None]:
    """Show as much as the flags want, and leave everything as it was.

    Progress bars are for people: there are none with `--quiet` or `--json`, nor, without
    `--verbose`, where stderr is no terminal. A warning that a library logs is shown once, by
    `--quiet` never, by `--verbose` as often as it comes, with what else is logged.
    """
    shown = not options.json and (sys.stderr.isatty() or has(options, "verbose"))
    with _progress_bars(shown and not has(options, "quiet")), _logs(options):
        yield


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    ours, of_the_hub = is_progress_bar_enabled(), are_progress_bars_disabled()
    if not shown:
        disable_progress_bar()
        disable_progress_bars()
    try:
        yield
    finally:
        if not shown and ours:
            enable_progress_bar()
        if not shown and not of_the_hub:
            enable_progress_bars()


@contextmanager
def _logs(options: argparse.Namespace) -> Iterator[None]:
    before = get_verbosity()
    if has(options, "verbose"):
        set_verbosity_info()
        try:
            yield
        finally:
            set_verbosity(before)
        return
    level = logging.ERROR if has(options, "quiet") else logging.WARNING
    handlers = [handler for name in _LIBRARIES for handler in logging.getLogger(name).handlers]
    handlers += [logging.lastResort] if logging.lastResort is not None else []
    filters = [(handler, _Once(level)) for handler in handlers]
    for handler, once in filters:
        handler.addFilter(once)
    try:
        yield
    finally:
        for handler, once in filters:
            handler.removeFilter(once)


# What the Hub's client logs before each of its tries when the Hub does not answer.
_RETRY = re.compile(r"Retrying in |'.*' thrown while requesting ", re.DOTALL)


class _Once(logging.Filter):
    """Lets a text through once, if it is of a level or above; of tries, one sentence."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if _RETRY.match(text):
            text = "hf-sparse: the Hub does not answer; trying again, for half a minute at most"
            record.msg, record.args = text, ()
        new = record.levelno >= self._level and text not in self._told
        self._told.add(text)
        return new
