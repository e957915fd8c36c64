"""The flags of `prune` that choose by effort instead of by method, and their checks."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_sparse_cli.choices import EFFORTS
from hf_sparse_cli.flags import named_list

# What an effort chooses.
_CHOSEN = (
    "method",
    "scope",
    "allocation",
    "refine",
    "reconstruct",
    "option",
    "stream",
    "token_weights",
)


def add_effort(command: argparse.ArgumentParser) -> None:
    """Flags for a run whose stages are chosen, or read from a file."""
    effort = command.add_argument_group(
        "or how much effort to make", named_list("efforts", EFFORTS)
    )
    effort.add_argument(
        "--effort", choices=EFFORTS, metavar="NAME", help="choose method and recovery, see above"
    )
    effort.add_argument("--recipe", metavar="FILE", help="do what a saved recipe says, exactly")
    effort.add_argument("--save-recipe", metavar="FILE", help="write what is done as a recipe")


def by_effort(options: argparse.Namespace) -> bool:
    """Whether the stages of a pruning are chosen by effort or read from a recipe."""
    return options.effort is not None or options.recipe is not None


def check_effort(options: argparse.Namespace) -> None:
    """Raise a ValueError or an OSError for flags that an effort or a recipe leaves nothing to do.

    Values that depend on it get their defaults.
    """
    if not by_effort(options):
        if options.save_recipe is not None:
            raise ValueError("--save-recipe is for --effort and --recipe: leave it out.")
        options.method = options.method or "wanda"
        options.num_samples = 128 if options.num_samples is None else options.num_samples
        return
    flag = "--effort" if options.effort is not None else "--recipe"
    if options.effort is not None and options.recipe is not None:
        raise ValueError("--effort chooses, and --recipe tells all: give one of them.")
    for name in _CHOSEN:
        if getattr(options, name):
            raise ValueError(f"{flag} chooses what --{name} tells: leave one of them out.")
    for name in ("bits", "group_size", "asymmetric", "embedding_bits"):
        if getattr(options, name):
            raise ValueError(
                f"--{name.replace('_', '-')}: {flag} chooses for weights of full precision. Leave it "
                "out, and round what is saved: hf-sparse quantize."
            )
    if options.recipe is not None:
        if not Path(options.recipe).is_file():
            raise FileNotFoundError(f"no such recipe: {options.recipe}")
        usual = {"pattern": "unstructured", "format": "auto", "uniform": False}
        for name in ("pattern", "sparsity", "targets", "ignore", "uniform", "format"):
            if getattr(options, name) not in (None, usual.get(name)):
                raise ValueError(f"--recipe tells what --{name} does: leave it out.")
    if not options.calibration and not options.labels:
        raise ValueError(
            f"{flag} needs calibration text: --calibration FILE, or of a classifier --labels FILE"
        )
