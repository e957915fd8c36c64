"""Shell completion: a script that `shtab` makes of the commands and their flags."""

from __future__ import annotations

import argparse
from typing import Any

from hf_sparse_cli.upstream import actions_of, commands_of

SHELLS = ("bash", "zsh", "fish", "tcsh")
# Arguments that name folders, and those that name files.
_FOLDERS = ("model", "folder", "output", "teacher", "dense", "base", "tokenizer")
_FILES = ("calibration", "labels", "data", "text", "gguf_file")


class PrintCompletion(argparse.Action):
    """A flag that prints the script for a shell, and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, options: Any, value: Any, *_: Any) -> None:
        print(script(parser, value))
        parser.exit()


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a command line for a shell of `SHELLS`.

    Raises:
        ImportError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ImportError(
            "completion scripts are made by shtab: pip install 'hf_sparse[completion]'"
        ) from error
    for part in (parser, *commands_of(parser).values()):
        for action in actions_of(part):
            if action.dest in _FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.dest in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    made: str = shtab.complete(parser, shell=shell)
    return made
