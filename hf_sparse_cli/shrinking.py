"""The flags of `hf-sparse shrink`, and what is refused of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from hf_sparse_cli.choices import BLOCK_CHOICES, EXPERT_CHOICES
from hf_sparse_cli.flags import (
    add_calibration,
    add_model,
    add_printing,
    add_saving,
    command_parser,
    named_list,
    output_group,
)
from hf_sparse_cli.names import number_or_fraction

# The ways to choose among the parts that go whole.
CHOICES: dict[str, Mapping[str, str]] = {
    "blocks": BLOCK_CHOICES,
    "experts": EXPERT_CHOICES,
    "hidden": {},
}


def add_shrink(commands: Any) -> None:
    """Add the command to the parser."""
    command = command_parser(
        commands,
        "shrink",
        "remove zero heads, neurons and experts, blocks or hidden features, and save what is left",
        "MODEL OUTPUT [--blocks|--experts|--hidden N|FRACTION --calibration FILE ...]",
        [
            "SPARSE SMALLER --uniform",
            "MODEL SMALLER --blocks 0.25 --calibration text.jsonl",
            "MIXTURE SMALLER --experts 0.25 --by reap --calibration text.jsonl",
        ],
    )
    add_model(command, "what to shrink")
    units = command.add_argument_group(
        "heads, neurons, zero experts", "Without flags of the next group, what is zero is removed."
    )
    units.add_argument(
        "--uniform",
        action="store_true",
        help="leave blocks of one size, so that the model loads without hf_sparse",
    )
    whole = command.add_argument_group(
        "blocks, experts, hidden features",
        f"{named_list('of blocks by', BLOCK_CHOICES)}\n{named_list('of experts by', EXPERT_CHOICES)}",
    )
    parts = whole.add_mutually_exclusive_group()
    for flag, help in (
        ("--blocks", "remove blocks instead: their number, or a fraction"),
        ("--experts", "remove experts of each block instead: a number, or a fraction"),
        ("--hidden", "remove features of the hidden size instead: a number, or a fraction"),
    ):
        parts.add_argument(flag, type=number_or_fraction, metavar="N", help=help)
    whole.add_argument(
        "--by",
        choices=[*BLOCK_CHOICES, *EXPERT_CHOICES],
        metavar="NAME",
        help="see above (default loss, or reap)",
    )
    whole.add_argument(
        "--merge", action="store_true", help="average removed experts into kept ones"
    )
    add_calibration(command, "Texts for --blocks, --experts and --hidden.", required=False)
    output = output_group(command, "folder to save the smaller model in")
    add_saving(output)
    add_printing(output)


def check_parts(options: argparse.Namespace) -> None:
    """Refuse flags of `shrink` that do not go together.

    Raises:
        ValueError: which, and what was wanted.
    """
    parts = [name for name in CHOICES if getattr(options, name) is not None]
    given = [name for name in ("by", "calibration", "labels", "merge") if getattr(options, name)]
    if not parts and given:
        raise ValueError(
            f"--{given[0]} is for --blocks N, --experts N and --hidden N: give one of them too, or "
            "leave it out."
        )
    for part in parts:
        _check_part(options, part)


def _check_part(options: argparse.Namespace, part: str) -> None:
    """Refuse flags that do not belong to whole blocks or experts, or that these lack."""
    count, choices = getattr(options, part), CHOICES[part]
    if options.uniform:
        raise ValueError(f"--uniform is for heads and neurons: leave it out with --{part}.")
    if options.by is not None and not choices:
        raise ValueError(f"--by is for blocks and experts: leave it out with --{part}.")
    if options.by is not None and options.by not in choices:
        raise ValueError(f"--by {options.by} is not for --{part}; wanted {', '.join(choices)}.")
    if options.merge and part != "experts":
        raise ValueError("--merge is for --experts alone: leave it out.")
    looks = options.by != "magnitude" or options.merge
    data = options.calibration or options.labels
    if looks and not data:
        raise ValueError(
            f"--{part} looks at data: --calibration FILE, or of a classifier --labels FILE"
        )
    if data and not looks:
        raise ValueError("--by magnitude looks at no data: leave --calibration and --labels out.")
    if count <= 0 or not (isinstance(count, int) or count < 1):
        raise ValueError(
            f"--{part} is {count}; wanted how many go: a number, as 4, or a fraction in (0, 1), "
            "as 0.25."
        )
