"""The flags of `report` and `inspect`, and what can be told of them before torch is imported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_sparse_cli.flags import add_folder, add_printing, command_parser


def add_report(commands: Any) -> None:
    """Add the command."""
    command = command_parser(
        commands,
        "report",
        "show models on an HTML page: what was done, where the zeros are, sizes, quality, time",
        "MODEL [MODEL ...] [--html FILE] [--base MODEL] [--latency]",
        [
            "SPARSE --base DENSE",
            "FIRST SECOND THIRD --html compared.html --latency",
            "SPARSE --matrix layers.3.mlp.up_proj --figures FOLDER",
        ],
    )
    what = command.add_argument_group("what to show")
    what.add_argument("models", metavar="MODEL", nargs="+", help="checkpoint folder or Hub name")
    what.add_argument(
        "--base", help="folder or Hub name of the dense model, to compare weights with"
    )
    what.add_argument(
        "--matrix", metavar="GLOB", help="the matrix whose zeros are drawn (default: the first)"
    )
    what.add_argument("--latency", action="store_true", help="also time a call on this machine")
    what.add_argument(
        "--tokens", type=int, default=128, help="tokens in a timed call (default 128)"
    )
    what.add_argument("--repeats", type=int, default=10, help="timed calls (default 10)")
    output = command.add_argument_group("output")
    output.add_argument(
        "--html", default="report.html", metavar="FILE", help="the page (default report.html)"
    )
    output.add_argument(
        "--figures", metavar="FOLDER", help="also write the pictures as SVG and PNG"
    )
    add_printing(output)


def check_report(options: argparse.Namespace) -> None:
    """Raise a ValueError or an OSError for files that cannot be written."""
    if Path(options.html).is_dir():
        raise IsADirectoryError(f"--html {options.html} is a folder; wanted a file for the page.")
    if options.figures is not None and Path(options.figures).is_file():
        raise NotADirectoryError(f"--figures {options.figures} is a file; wanted a folder.")


def add_inspect(commands: Any) -> None:
    """Add the command that reads a folder."""
    command = command_parser(
        commands,
        "inspect",
        "read a checkpoint's sparsity from its files",
        "FOLDER",
        ["SPARSE", "user/name-sparse --tensors"],
    )
    add_folder(command, "what to read", "folder, or user/name on the Hub")
    add_printing(command.add_argument_group("output"), tensors=True)
