"""What a command tells beside its result: how much, in which words, and with which exit code."""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hf_sparse_cli.words import in_flags

# 128 + the number of a signal is how shells tell it.
DONE, FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141
EXIT_CODES = {
    DONE: "done",
    FAILED: "refused or failed: the reason is on stderr, and nothing was half written",
    USAGE: "the command line cannot be parsed",
    INTERRUPTED: "interrupted by Ctrl-C: --stream and --effort keep finished blocks",
    BROKEN_PIPE: "the program that reads the output has ended (as head does)",
}
# Modules whose warnings are about what the user gave; those of others are shown by --verbose.
_OURS = r"hf_sparse(\.|_cli|$)"


def add_messages(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every command has, before its name and behind it."""
    group = parser.add_argument_group("messages")
    loudness = group.add_mutually_exclusive_group()
    for short, flag, help in (
        ("-q", "--quiet", "print only the result and errors: no progress bars, no warnings"),
        ("-v", "--verbose", "also print logs and warnings of other libraries"),
    ):
        loudness.add_argument(
            short, flag, action="store_true", default=argparse.SUPPRESS, help=help
        )
    group.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print errors with a traceback",
    )


def has(options: argparse.Namespace, flag: str) -> bool:
    """Whether one of the flags was given; an early error comes before they are read."""
    return bool(getattr(options, flag, False))


def exit_codes() -> str:
    """The codes and what they mean, for help."""
    return "\n".join(["exit codes:", *(f"  {code:3}  {told}" for code, told in EXIT_CODES.items())])


def warn(text: str) -> None:
    """Tell a warning."""
    print(f"hf-sparse: warning: {in_flags(text)}", file=sys.stderr)


def tell_error(error: Exception, options: argparse.Namespace) -> int:
    """Tell an error without a traceback, unless it is asked for; returns the exit code.

    What the package and its libraries raise on purpose is told as it is. Anything else is a fault of
    the program, and is told as one.
    """
    if has(options, "debug"):
        traceback.print_exception(error)
    if isinstance(error, (ValueError, OSError, ImportError)):
        print(f"hf-sparse: error: {in_flags(str(error))}", file=sys.stderr)
        return FAILED
    text = f"hf-sparse: error: {type(error).__name__}: {error}"
    hint = "the same command with --debug shows where this comes from, for a report of the fault."
    print(text if has(options, "debug") else f"{text}\n{hint.capitalize()}", file=sys.stderr)
    return FAILED


@contextmanager
def warnings_in_words(options: argparse.Namespace) -> Iterator[None]:
    """While it is open, Python's warnings are told as the flags want it, each once.

    Warnings of other libraries are about what their callers wrote, not about what a user typed: they
    are shown by `--verbose` alone. Those of hf_sparse are told in a line, without file and source.
    """

    def told(message: Warning | str, *place: Any, **more: Any) -> None:
        text = str(message)
        if not has(options, "quiet") and text not in before:
            before.add(text)
            warn(text)

    before: set[str] = set()
    with warnings.catch_warnings():
        if not has(options, "verbose"):
            warnings.filterwarnings("ignore", module=rf"(?!{_OURS})")
        warnings.showwarning = told
        yield
