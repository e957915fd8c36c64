"""The flags of the commands that make models smaller: `shrink` and `slim`."""

from __future__ import annotations

from typing import Any

from hf_sparse_cli.choices import BLOCK_CHOICES, SLIM_AXES
from hf_sparse_cli.flags import (
    TEXT,
    add_labels,
    add_loading,
    add_printing,
    add_saving,
    add_windows,
    command_parser,
    named_list,
    output_group,
)
from hf_sparse_cli.names import number_or_fraction


def add_shrink(commands: Any) -> None:
    """Add the command `shrink`."""
    command = command_parser(
        commands,
        "shrink",
        "remove heads and neurons that are zero, or whole blocks, and save the smaller model",
        "MODEL OUTPUT [--blocks N|FRACTION --calibration FILE ...]",
        ["SPARSE SMALLER --uniform", "MODEL SMALLER --blocks 0.25 --calibration text.jsonl"],
    )
    what = command.add_argument_group("what to shrink")
    what.add_argument("model", metavar="MODEL", help="folder or Hub name")
    add_loading(what)
    units = command.add_argument_group(
        "heads and neurons", "Those that are zero, without --blocks."
    )
    units.add_argument(
        "--uniform", action="store_true", help="blocks of one size: loads without hf_sparse"
    )
    blocks = command.add_argument_group("blocks", named_list("by", BLOCK_CHOICES))
    blocks.add_argument(
        "--blocks",
        type=number_or_fraction,
        metavar="N",
        help="how many blocks go instead: a number, or a fraction of them",
    )
    blocks.add_argument(
        "--by", choices=BLOCK_CHOICES, metavar="NAME", help="see above (default loss)"
    )
    _add_data(command, "Texts that --blocks looks at.", required=False)
    output = output_group(command, "folder to save the smaller model in")
    add_saving(output)
    add_printing(output)


def add_slim(commands: Any) -> None:
    """Add the command `slim`."""
    command = command_parser(
        commands,
        "slim",
        "make a smaller model for one budget, of fewer and smaller blocks, and save it",
        "MODEL OUTPUT --params SHARE|--ms TIME|--mb SIZE --calibration FILE ...",
        [
            "MODEL SMALLER --params 0.7 --calibration text.jsonl",
            "MODEL SMALLER --ms 0.6x --axes depth --calibration text.jsonl",
        ],
    )
    what = command.add_argument_group("what to slim")
    what.add_argument("model", metavar="MODEL", help="folder or Hub name")
    add_loading(what)
    wanted = command.add_argument_group("budget", named_list("axes", SLIM_AXES))
    one = wanted.add_mutually_exclusive_group(required=True)
    one.add_argument(
        "--params",
        type=number_or_fraction,
        metavar="N",
        help="weights of the whole model: a share, as 0.7, or a number",
    )
    one.add_argument("--ms", metavar="TIME", help="of a forward pass: milliseconds, or 0.6x")
    one.add_argument("--mb", type=float, metavar="SIZE", help="megabytes of weights")
    wanted.add_argument(
        "--axes", nargs="+", choices=SLIM_AXES, metavar="NAME", help="see above (default all)"
    )
    _add_data(command, "Texts that losses are measured on.", required=True)
    output = output_group(command, "folder to save the smaller model in")
    add_saving(output)
    add_printing(output)


def _add_data(command: Any, told: str, *, required: bool) -> None:
    calibration = command.add_argument_group("calibration", told)
    data = calibration.add_mutually_exclusive_group(required=required)
    data.add_argument("--calibration", nargs="+", metavar="FILE", help=TEXT)
    add_labels(calibration, data)
    calibration.add_argument(
        "--num-samples", type=int, default=32, help="windows, or rows at most (default 32)"
    )
    add_windows(calibration)
