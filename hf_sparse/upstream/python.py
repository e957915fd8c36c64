"""What Python's own modules keep private."""

from __future__ import annotations

from re import _parser  # type: ignore[attr-defined]
from typing import Any

__all__ = ["parse_expression"]


def parse_expression(text: str) -> Any:
    """A regular expression as `re` reads it: pairs of a kind, such as `MAX_REPEAT`, and its parts.

    Raises:
        re.error: it is no regular expression.
    """
    return _parser.parse(text)
