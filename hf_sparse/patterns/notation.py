"""The notations that patterns are parsed from."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from hf_sparse.patterns.groups import Block, Column, Head, Row
from hf_sparse.patterns.pattern import Pattern
from hf_sparse.patterns.single import NM, Unstructured
from hf_sparse.suggestions import meant_pattern, shortened

NOTATIONS = (
    "unstructured",
    "N:M (2:4, 4:8, ...)",
    "block:RxC",
    "row",
    "column",
    "head",
    "head:D",
    "head_in:D",
)
_PLAIN: dict[str, Pattern] = {
    "unstructured": Unstructured(),
    "row": Row(),
    "column": Column(),
    "head": Head(),
}
_SIZED: dict[str, Callable[..., Pattern]] = {
    r"(\d{1,4}):(\d{1,4})": NM,
    r"block:(\d{1,6})x(\d{1,6})": Block,
    r"head:(\d{1,6})": Head,
    r"head_in:(\d{1,6})": partial(Head, inputs=True),
}


def parse(notation: str) -> Pattern:
    """Read a pattern from its notation: see `Pattern.parse`."""
    if not isinstance(notation, str):
        raise ValueError(
            f"pattern is a {type(notation).__name__}: {shortened(notation)}. Wanted a string, one "
            f"of {', '.join(NOTATIONS)}.{meant_pattern(str(notation), _read)}"
        )
    if (pattern := _read(notation)) is not None:
        return pattern
    raise ValueError(
        f"unknown pattern {shortened(notation)}. Known patterns: {', '.join(NOTATIONS)}."
        f"{meant_pattern(notation, _read)}"
    )


def _read(notation: str) -> Pattern | None:
    """The pattern of a notation; None: it is none."""
    if notation in _PLAIN:
        return _PLAIN[notation]
    for shape, pattern in _SIZED.items():
        if match := re.fullmatch(shape, notation, re.ASCII):
            return pattern(*map(int, match.groups()))
    return None
