"""The `hf-sparse` command, up to the moment when it runs.

It is a package of its own because importing `hf_sparse` imports torch and transformers, which takes
seconds: help and wrong usage are answered without them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hf_sparse_cli.parser import make_parser
from hf_sparse_cli.usage import check, doubts, unfinished
from hf_sparse_cli.words import in_flags

__all__ = ["main"]

_INTERRUPTED, _BROKEN_PIPE = 130, 141  # 128 + the signal's number, as shells tell it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 done, 1 failed, 130 interrupted, 141 nobody reads the output any more.

    Raises:
        SystemExit: 0 after `--help`, 2 for arguments that cannot be parsed.
    """
    options = argparse.Namespace()
    try:
        try:
            make_parser().parse_args(arguments, options)
            check(options)
            for doubt in doubts(options):
                print(f"hf-sparse: {doubt}", file=sys.stderr)
            from hf_sparse.cli.commands import run

            return run(options)
        finally:
            print(end="", flush=True)  # a broken pipe is noticed here, not when Python ends
    except BrokenPipeError:
        _leave_stdout()
        return _BROKEN_PIPE
    except (ValueError, OSError, ImportError) as error:
        print(f"hf-sparse: error: {in_flags(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nhf-sparse: interrupted.{_hint(options)}", file=sys.stderr)
        return _INTERRUPTED


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
