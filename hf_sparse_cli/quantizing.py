"""The flags that tell a grid of few bits, and those of `hf-sparse quantize`."""

from __future__ import annotations

import argparse
import re
from typing import Any

from hf_sparse_cli.choices import BITS, GROUP_SIZES, ROUNDINGS
from hf_sparse_cli.flags import (
    add_calibration,
    add_model,
    add_output,
    command_parser,
    named_list,
)


def add_grid(group: Any) -> None:
    """The grid that weights are rounded to."""
    group.add_argument(
        "--bits", type=int, choices=BITS, help="bits of the weights (default: not rounded)"
    )
    group.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        help="inputs of a row that share a scale (default: the whole row)",
    )
    group.add_argument(
        "--asymmetric", action="store_true", help="give each group a zero point, too"
    )
    group.add_argument(
        "--embedding-bits",
        type=int,
        choices=BITS,
        help="bits of the input embeddings and the output head (default: not rounded)",
    )


def add_quantize(commands: Any) -> None:
    """Add the command `quantize`."""
    command = command_parser(
        commands,
        "quantize",
        "round a dense or sparse model to few bits, its zeros kept, and save it",
        "MODEL OUTPUT --bits 8|4 [--group-size N] [--calibration FILE ...]",
        [
            "MODEL OUTPUT --bits 8 --embedding-bits 8",
            "MODEL OUTPUT --bits 4 --group-size 32 --calibration text.jsonl",
            "MODEL OUTPUT --bits 4 --group-size 32 --bit-budget 0.2x --calibration text.jsonl",
        ],
    )
    what = add_model(command, "what to quantise")
    what.add_argument("--ignore", nargs="+", metavar="GLOB", help="layers to leave out")
    how = command.add_argument_group("grid", named_list("methods", ROUNDINGS))
    add_grid(how)
    how.add_argument(
        "--method",
        choices=ROUNDINGS,
        metavar="NAME",
        help="see above (default gptq with --calibration, else nearest)",
    )
    how.add_argument(
        "--bit-budget",
        metavar="SHARE",
        help="keep layers with the largest errors unrounded, within a share of the bytes such as 0.2x",
    )
    add_calibration(
        command, "Texts on which the errors of the layers are measured.", required=False
    )
    add_output(command, "folder to save the quantised model in", tensors=True)


def check_grid(options: argparse.Namespace, *, needed: bool) -> None:
    """Refuse flags of a grid that tell no bits.

    Args:
        options: of the command.
        needed: whether the command does nothing without bits.

    Raises:
        ValueError: see there.
    """
    if options.bits is not None or options.embedding_bits is not None:
        return
    if needed:
        raise ValueError("no bits are given: --bits 8, --bits 4, or --embedding-bits 8.")
    for flag, given in (("--group-size", options.group_size), ("--asymmetric", options.asymmetric)):
        if given:
            raise ValueError(f"{flag} tells of a grid, and no bits are given: add --bits 4.")


def check_quantize(options: argparse.Namespace) -> None:
    """Refuse what `hf-sparse quantize` cannot do.

    Raises:
        ValueError: no bits, or a method or a budget that needs data without any.
    """
    check_grid(options, needed=True)
    if options.bit_budget is not None:
        _check_budget(options)
    if options.method == "gptq" and not options.calibration and not options.labels:
        raise ValueError(
            "method 'gptq' needs calibration text: --calibration FILE, or of a classifier --labels FILE"
        )


def _check_budget(options: argparse.Namespace) -> None:
    """Refuse --bit-budget that is no share, or without bits or data."""
    text = options.bit_budget.removesuffix("x")
    if not re.fullmatch(r"\d*\.?\d+", text) or not 0 < float(text) <= 1:
        raise ValueError(
            f"--bit-budget {options.bit_budget}: wanted a share of the bytes that the targets take "
            "now, above 0 and at most 1, as 0.2x."
        )
    if options.bits is None:
        raise ValueError(
            "--bit-budget chooses among the targets, which stay as they are: add --bits 4."
        )
    if not options.calibration and not options.labels:
        raise ValueError(
            "--bit-budget measures each layer on text: --calibration FILE, or of a classifier "
            "--labels FILE."
        )


def grid_options(options: argparse.Namespace) -> dict[str, Any]:
    """The values of `SparsityConfig` that the flags of a grid give."""
    return {
        "bits": options.bits,
        "group_size": options.group_size,
        "symmetric": not options.asymmetric,
        "embedding_bits": options.embedding_bits,
    }
