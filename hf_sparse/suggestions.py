"""Errors about names that are not known, with the name that was probably meant; deprecated names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# What other notations of a pattern probably mean, from the numbers in them.
_OTHER_NOTATIONS = {
    r"\D*(\d+)\s*(?:[x*\u00d7]|by)\s*(\d+)\D*": "block:{}x{}",
    r"head[ _-]?in\D*(\d+)": "head_in:{}",
    r"heads?\D*(\d+)": "head:{}",
    r"\D*(\d+)\D+(\d+)\D*": "{}:{}",
    r"([1-9])([1-9]|16)": "{}:{}",
    r"(?:semi|half)\W?structured|n:?m": "2:4",
    r"inputs?|in_features|neurons?": "column",
    r"outputs?|out_features": "row",
    r"blocks?": "block:4x1",
    r"(?:whole )?experts|moe|mixture": "expert",
}
_NOTATIONS = ("unstructured", "2:4", "block:4x1", "row", "column", "head", "expert")


def check_name(found: object, known: Iterable[str], kind: str, kinds: str) -> None:
    """Refuse a name that is not among those known.

    Args:
        found: what was given.
        known: the names that there are.
        kind, kinds: what they are names of, for the error: `"method"`, `"methods"`.

    Raises:
        ValueError: what was found, the names, and the one that was probably meant.
    """
    known = list(known)
    if not isinstance(found, str) or found not in known:
        raise ValueError(
            f"unknown {kind} {shortened(found)}. Known {kinds}: {', '.join(known)}."
            f"{did_you_mean(found, known)}"
        )


def did_you_mean(found: object, known: Iterable[str]) -> str:
    """A question after an error: the known name that is most like the one found, if one is."""
    if not isinstance(found, str):
        return ""
    named = {name.lower(): name for name in known}
    close = get_close_matches(found.strip().lower(), named, n=1)
    return f" Did you mean {named[close[0]]!r}?" if close else ""


def shortened(value: object) -> str:
    """The repr of a value in an error, at most a line of it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def deprecated_name(
    name: str, function: Callable[_Arguments, _Result]
) -> Callable[_Arguments, _Result]:
    """A function under the name that it had before: a call warns, and calls the function.

    Args:
        name: the old name.
        function: under its new name.
    """
    advice = f"hf_sparse.{name} is deprecated: it is called hf_sparse.{function.__name__} now."

    @wraps(function)
    def renamed(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        warnings.warn(advice, FutureWarning, stacklevel=2)
        return function(*args, **kwargs)

    renamed.__name__ = renamed.__qualname__ = name
    renamed.__doc__ = f"Deprecated: call `{function.__name__}`, which this calls after a warning."
    return renamed


def meant_pattern(notation: str, read: Callable[[str], object]) -> str:
    """A question after an error: the pattern that was probably meant.

    Args:
        notation: of no pattern.
        read: gives the pattern of a notation; None or a ValueError: it is none.
    """
    plain = notation.strip().lower()
    if re.fullmatch(r"0?\.\d+|\d+(\.\d+)?\s*%", plain, re.ASCII):
        share = float(plain.rstrip("% ")) / (100 if plain.endswith("%") else 1)
        return f' Did you mean SparsityConfig("unstructured", sparsity={share:g})?'
    if plain == "structured":
        return " Did you mean 'column' (whole neurons) or 'head'?"
    for other, wanted in _OTHER_NOTATIONS.items():
        if match := re.fullmatch(other, plain, re.ASCII):
            meant = wanted.format(*match.groups())
            try:
                if read(meant) is not None:
                    return f" Did you mean {meant!r}?"
            except ValueError:
                break
    example = " For example '2:4' keeps at most 2 of 4 consecutive weights."
    return did_you_mean(plain, _NOTATIONS) or example
