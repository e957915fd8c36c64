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
        ["SPARSE OUTPUT --data text.jsonl --method lora --teacher DENSE"],
    )
    what = add_folder(command, "what to train", "folder or Hub name of the sparse model")
    add_loading(what)
    how = command.add_argument_group("how to train", named_list("methods", RECOVERIES))
    how.add_argument(
        "--method",
        default="finetune",
        choices=RECOVERIES,
        metavar="NAME",
        help="see above (default finetune)",
    )
    how.add_argument("--teacher", help="the dense model, to learn from its logits")
    how.add_argument("--epochs", type=int, default=1, help="passes over the data (default 1)")
    how.add_argument("--accumulate", type=int, default=2, help="batches in a step (default 2)")
    how.add_argument(
        "--lr", type=_rate, metavar="LR", help="peak learning rate, or search (default by method)"
    )
    how.add_argument("--r", type=int, help="rank of lora, or its like of shira")
    how.add_argument("--logits", type=float, default=0.5, help="the teacher's share (default 0.5)")
    how.add_argument("--hidden", type=float, default=0.0, help="weight of its states (default 0)")
    how.add_argument("--temperature", type=float, default=2.0, help="of its logits (default 2)")
    how.add_argument(
        "--held-out",
        type=int,
        default=0,
        metavar="N",
        help="last batches, to choose the weights by",
    )
    data = command.add_argument_group("data")
    data.add_argument("--data", nargs="+", required=True, metavar="FILE", help=TEXT)
    data.add_argument("--num-samples", type=int, help="windows of the data (default all)")
    add_windows(data)
    output = output_group(command, "folder to save the recovered model in")
    output.add_argument(
        "--format", choices=FORMATS, metavar="NAME", help="storage (default as the model's config)"
    )
    add_overwrite(output)
    add_printing(output, tensors=True)


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
