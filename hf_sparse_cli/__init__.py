"""The `hf-sparse` command, up to the moment when it runs.

It is a package of its own because importing `hf_sparse` imports torch and transformers, which takes
seconds: help and wrong usage are answered without them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hf_sparse_cli.messages import (
    BROKEN_PIPE,
    INTERRUPTED,
    has,
    tell_error,
    warn,
    warnings_in_words,
)
from hf_sparse_cli.parser import make_parser
from hf_sparse_cli.places import unfinished
from hf_sparse_cli.tour import tour
from hf_sparse_cli.usage import check, doubts

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; without arguments, show what there is.

    Returns:
        The exit code: 0 done, 1 failed, 130 interrupted, 141 nobody reads the output any more.

    Raises:
        SystemExit: 0 after `--help`, 2 for arguments that cannot be parsed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = argparse.Namespace()
    try:
        try:
            with warnings_in_words(options):
                return _run(given, options)
        finally:
            print(end="", flush=True)  # a broken pipe is noticed here, not when Python ends
    except BrokenPipeError:
        _leave_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"\nhf-sparse: interrupted.{_hint(options)}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return tell_error(error, options)


def _run(given: Sequence[str], options: argparse.Namespace) -> int:
    """Do what the arguments say; they are parsed into the options."""
    parser = make_parser()
    if not given:
        print(tour(parser))
        return 0
    parser.parse_args(given, options)
    check(options)
    if not has(options, "quiet"):
        for doubt in doubts(options):
            warn(doubt)
    from hf_sparse.cli.commands import run

    return run(options)


def _hint(options: argparse.Namespace) -> str:
    """How to go on after an interruption, if something was kept."""
    by_effort = getattr(options, "effort", None) or getattr(options, "recipe", None)
    if not getattr(options, "stream", False) and not by_effort:
        return ""
    work = unfinished(options.output)
    if not any(work.glob("*.safetensors")):
        return " No block was finished: nothing is kept."
    again = "the same command" if options.resume else "the same command with --resume"
    return f" Finished blocks are in {work}: {again} goes on from there."


def _leave_stdout() -> None:
    """Write what is still buffered to nowhere, or Python complains about it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
