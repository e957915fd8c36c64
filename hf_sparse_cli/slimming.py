"""The flags of `hf-sparse slim`."""

from __future__ import annotations

from typing import Any

from hf_sparse_cli.choices import SLIM_AXES
from hf_sparse_cli.flags import (
    add_calibration,
    add_model,
    add_output,
    command_parser,
    named_list,
)
from hf_sparse_cli.names import number_or_fraction


def add_slim(commands: Any) -> None:
    """Add the command `slim`."""
    command = command_parser(
        commands,
        "slim",
        "make a smaller model for one budget, of fewer and smaller blocks or experts, and save it",
        "MODEL OUTPUT --params SHARE|--ms TIME|--mb SIZE --calibration FILE ...",
        [
            "MODEL SMALLER --params 0.7 --calibration text.jsonl",
            "MODEL SMALLER --ms 0.6x --axes depth --calibration text.jsonl",
        ],
    )
    add_model(command, "what to slim")
    wanted = command.add_argument_group("budget", named_list("axes", SLIM_AXES))
    one = wanted.add_mutually_exclusive_group(required=True)
    one.add_argument(
        "--params",
        type=number_or_fraction,
        metavar="N",
        help="weights of the whole model: a share, such as 0.7, or a number",
    )
    one.add_argument(
        "--ms", metavar="TIME", help="time of a forward pass: milliseconds, or a share such as 0.6x"
    )
    one.add_argument("--mb", type=float, metavar="SIZE", help="megabytes of weights")
    wanted.add_argument(
        "--axes",
        nargs="+",
        choices=SLIM_AXES,
        metavar="NAME",
        help="what to remove, see above (default depth and width; for mixtures depth and experts)",
    )
    add_calibration(command, "Texts on which the losses are measured.", required=True)
    add_output(command, "folder to save the smaller model in")
