"""Flags that several commands share, and how a command is laid out."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from hf_sparse_cli.choices import DTYPES

TEXT = '.jsonl with "text" fields, or plain text'


def command_parser(
    commands: Any, name: str, summary: str, usage: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """A command with a short line of usage, and examples after its flags."""
    lines = [f"  hf-sparse {name} {example}" for example in examples]
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        usage=f"hf-sparse {name} {usage} [flags]",
        epilog="\n".join(["examples:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return command


def named_list(title: str, entries: Mapping[str, str]) -> str:
    """A list of names and what they mean, for the head of a group of flags."""
    width = max(map(len, entries))
    return "\n".join([f"{title}:", *(f"  {name:{width}}  {entries[name]}" for name in entries)])


def output_group(
    command: argparse.ArgumentParser, help: str, description: str | None = None
) -> Any:
    """The group of the flags of the output, with the folder."""
    output = command.add_argument_group("output", description)
    output.add_argument("output", metavar="OUTPUT", help=help)
    return output


def add_saving(group: Any) -> None:
    """Flags for the model card of what is saved, and for replacing another model."""
    group.add_argument("--base-model", help="Hub name of the dense model, for the model card")
    add_overwrite(group)


def add_output(command: argparse.ArgumentParser, help: str, tensors: bool = False) -> None:
    """Add the group of flags of the output: its folder, what is saved beside it, what is printed."""
    output = output_group(command, help)
    add_saving(output)
    add_printing(output, tensors)


def add_overwrite(group: Any) -> None:
    """Whether the output may replace what is there."""
    group.add_argument("--overwrite", action="store_true", help="replace a model that is in OUTPUT")


def add_printing(group: Any, tensors: bool = False) -> None:
    """How the result is printed."""
    if tensors:
        group.add_argument("--tensors", action="store_true", help="list every tensor")
    group.add_argument("--json", action="store_true", help="print the result as JSON")


def add_labels(group: Any, data: Any) -> None:
    """Labelled texts, of a classifier."""
    data.add_argument(
        "--labels",
        nargs="+",
        metavar="FILE",
        help='.jsonl with text fields and "label", for classifiers',
    )
    group.add_argument(
        "--fields",
        default="sentence",
        help="names of the text fields in --labels: one, or two with a comma (default sentence)",
    )


def add_windows(group: Any) -> None:
    """How texts are cut."""
    group.add_argument("--window", type=int, default=512, help="tokens in a window (default 512)")
    group.add_argument("--batch-size", type=int, default=1, help="windows at a time (default 1)")


def add_loading(group: Any, tokenizer: bool = True) -> None:
    """What loading a model needs beside its name."""
    if tokenizer:
        group.add_argument(
            "--tokenizer", help="folder or Hub name of the tokenizer, if the model has none"
        )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="type of the weights (default auto: as stored)",
    )
    group.add_argument(
        "--gguf-file", help="name of the GGUF file in the dense model's folder, to read it instead"
    )


def add_model(
    command: argparse.ArgumentParser,
    title: str,
    description: str | None = None,
    *,
    tokenizer: bool = True,
) -> Any:
    """Add the group of flags that name a model, and tell how it is loaded; the group is returned."""
    group = command.add_argument_group(title, description)
    group.add_argument("model", metavar="MODEL", help="folder or Hub name")
    add_loading(group, tokenizer)
    return group


def add_folder(command: argparse.ArgumentParser, title: str, help: str) -> Any:
    """Add the group of flags that name a checkpoint's folder; the group is returned."""
    group = command.add_argument_group(title)
    group.add_argument("folder", metavar="FOLDER", help=help)
    return group


def add_calibration(command: Any, told: str, *, required: bool) -> None:
    """Add the group of flags that name calibration data: texts, or rows with labels."""
    calibration = command.add_argument_group("calibration", told)
    data = calibration.add_mutually_exclusive_group(required=required)
    data.add_argument("--calibration", nargs="+", metavar="FILE", help=TEXT)
    add_labels(calibration, data)
    calibration.add_argument(
        "--num-samples",
        type=int,
        default=32,
        help="windows of text, or rows of --labels, at most (default 32)",
    )
    add_windows(calibration)
