"""The command line before the name of a command: its own flags, exit codes, examples."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from hf_sparse_cli.completion import SHELLS, PrintCompletion
from hf_sparse_cli.messages import add_messages, exit_codes
from hf_sparse_cli.names import Parser

_EXAMPLES = """\
examples:
  hf-sparse                     a first run, and the commands by what they are for
  hf-sparse prune --help        the flags of a command, with examples
  hf-sparse --completion bash > ~/.local/share/bash-completion/completions/hf-sparse"""


def top_parser() -> Parser:
    """The parser without its commands."""
    parser = Parser(
        prog="hf-sparse",
        description="Make language models sparse, measure, inspect and publish them.",
        usage="hf-sparse COMMAND ... [flags]",
        epilog=f"{exit_codes()}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version)
    parser.add_argument(
        "--completion",
        action=PrintCompletion,
        choices=SHELLS,
        metavar="SHELL",
        help=f"print the completion script for {', '.join(SHELLS)} and exit",
    )
    add_messages(parser)
    return parser


class _Version(argparse.Action):
    """Prints the installed version; reading it takes some time, so that it is read only here."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> None:
        from importlib.metadata import version

        print(f"hf_sparse {version('hf_sparse')}")
        parser.exit()
