"""The values that options of pruning methods may have, checked before any work.

An option of one name means the same in every method, so that one table holds them all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_sparse.arguments import Bound
from hf_sparse.patterns import Pattern
from hf_sparse.suggestions import did_you_mean, shortened

SCOPES = ("layer", "global")
SOLVERS = ("sparsegpt", "alps")


def _above(least: float) -> Bound:
    return lambda value: value > least, f"> {least}"


def _from(least: float) -> Bound:
    return lambda value: value >= least, f">= {least}"


def _one_of(names: Sequence[str]) -> Bound:
    return lambda value: value in names, f"one of {', '.join(names)}"


def _is_folder(value: str | os.PathLike[str] | None) -> bool:
    return value is None or not Path(value).is_file()


BOUNDS: dict[str, Bound] = {
    "scope": _one_of(SCOPES),
    "damping": _above(0),
    "block_size": _from(1),
    "rounds": _from(0),
    "penalty": _above(0),
    "solver": _one_of(SOLVERS),
    "iterations": _from(1),
    "refit_steps": _from(0),
    "lam": _above(0),
    "growth": _from(1),
    "relative_lr": _above(0),
    "preserve": _from(0),
    "epochs": _from(1),
    "accumulate": _from(1),
    "gradient_checkpointing": (lambda _: True, "True or False"),
    "state": (_is_folder, "a folder, which may be new"),
}


def check_types(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse values that are not of the type of their option's default.

    Raises:
        ValueError: the option, its value, and what was wanted.
    """
    for name, value in options.items():
        if not _is_like(value, defaults[name]):
            raise ValueError(
                f"{name} is {shortened(value)}; wanted a value like {defaults[name]!r}."
            )


def check_bounds(options: Mapping[str, Any], pattern: Pattern, allocation: str) -> None:
    """Refuse values of a method's own options that are out of range, or that contradict the rest.

    Args:
        options: those that were given.
        pattern: of the zeros.
        allocation: how the sparsity is shared by the blocks.

    Raises:
        ValueError: the option, its value, and what was wanted.
    """
    for name, value in options.items():
        is_inside, wanted = BOUNDS[name]
        if not is_inside(value):
            names = {"scope": SCOPES, "solver": SOLVERS}.get(name, ())
            raise ValueError(
                f"{name} is {shortened(value)}; wanted {wanted}.{did_you_mean(value, names)}"
            )
    if options.get("scope") != "global":
        return
    if pattern.implied_sparsity is not None:
        raise ValueError(
            f"scope='global' has no meaning for pattern '{pattern}', which fixes the sparsity "
            "of every group. Use scope='layer'."
        )
    if allocation != "uniform":
        raise ValueError(
            "scope='global' and allocation both tell how much of the sparsity each block takes. Use "
            "one of them."
        )


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value is of the type of a default; whole numbers are floats, too."""
    if isinstance(value, bool) != isinstance(default, bool):
        return False
    if isinstance(default, float):
        largest = sys.float_info.max  # NaN compares as false
        return isinstance(value, int | float) and -largest <= value <= largest
    if default is None:
        return value is None or isinstance(value, str | os.PathLike)
    return isinstance(value, type(default))
