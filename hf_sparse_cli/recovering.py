"""The command `recover` and its flags."""

from __future__ import annotations

import argparse
from typing import Any

from hf_sparse_cli.choices import FORMATS, RECOVERIES
from hf_sparse_cli.flags import (
    TEXT,
    add_folder,
    add_loading,
    add_overwrite,
    add_printing,
    add_windows,
    command_parser,
    named_list,
    output_group,
)


def add_recover(commands: Any) -> None:
    """Add the command that trains a sparse model."""
    command = command_parser(
        commands,
        "recover",
        "train a sparse model, its zeros kept",
        "FOLDER OUTPUT --data FILE [FILE ...] [--method NAME]",
        [
            "SPARSE OUTPUT --data text.jsonl",
            "SPARSE OUTPUT --data text.jsonl --method lora --teacher DENSE",
        ],
    )
    what = add_folder(command, "what to train", "folder or Hub name of the sparse model")
    add_loading(what)
    _add_training(command)
    data = command.add_argument_group("data")
    data.add_argument("--data", nargs="+", required=True, metavar="FILE", help=TEXT)
    data.add_argument("--num-samples", type=int, help="windows of the data (default all)")
    add_windows(data)
    output = output_group(command, "folder to save the recovered model in")
    output.add_argument(
        "--format",
        choices=FORMATS,
        metavar="NAME",
        help="storage format (default: that of the model's config)",
    )
    add_overwrite(output)
    add_printing(output, tensors=True)


def _add_training(command: argparse.ArgumentParser) -> None:
    """How the model is trained."""
    how = command.add_argument_group("how to train", named_list("methods", RECOVERIES))
    how.add_argument(
        "--method",
        default="finetune",
        choices=RECOVERIES,
        metavar="NAME",
        help="see above (default finetune)",
    )
    how.add_argument(
        "--teacher", help="folder or Hub name of the dense model, whose logits are learned"
    )
    how.add_argument("--epochs", type=int, default=1, help="passes over the data (default 1)")
    how.add_argument("--accumulate", type=int, default=2, help="batches in a step (default 2)")
    how.add_argument(
        "--lr",
        type=_rate,
        metavar="LR",
        help="peak learning rate, or search, which tries three (default by method)",
    )
    how.add_argument(
        "--r",
        type=int,
        help="rank of lora; shira trains r * (in + out) weights of a layer (default 16)",
    )
    how.add_argument(
        "--logits",
        type=float,
        default=0.5,
        help="share of the teacher's logits in the loss (default 0.5)",
    )
    how.add_argument(
        "--hidden",
        type=float,
        default=0.0,
        help="weight of the teacher's hidden states (default 0)",
    )
    how.add_argument(
        "--temperature", type=float, default=2.0, help="temperature of the logits (default 2)"
    )
    how.add_argument(
        "--held-out",
        type=int,
        default=0,
        metavar="N",
        help="do not train on the last N batches; keep the weights that are best on them",
    )


def _rate(text: str) -> float | str:
    """A learning rate: a number, or the word that lets it be chosen.

    Raises:
        ArgumentTypeError: it is neither.
    """
    if text == "search":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number nor search") from None
