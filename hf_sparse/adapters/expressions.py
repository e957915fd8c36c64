"""Regular expressions in the settings of an adapter: how long matching them can take.

Python's `re` tries one way after another. A name of a few dozen letters can be matched in more ways
than there is time for, as by `(a+)+b`. PEFT matches what an adapter's file says with every name in a
model, so that such an expression is refused before.
"""

from __future__ import annotations

import re
from typing import Any

from hf_sparse.upstream.python import parse_expression

# Letters in a name of a module, at most: how often `.*` can repeat.
_LETTERS = 100
# Ways to match a name, at most: four times `.*` in a row, and a few choices beside.
_MOST_WAYS = 1e9


def is_fast_expression(text: Any) -> bool:
    """Whether this is a regular expression, with a bounded number of ways to match a name.

    >>> is_fast_expression(r".*\\.(q|v)_proj"), is_fast_expression("(a+)+b")
    (True, False)
    """
    try:
        re.compile(text)
        return _ways(parse_expression(text)) <= _MOST_WAYS
    except (re.error, TypeError, OverflowError, RecursionError):
        return False


def _ways(parsed: Any) -> float:
    """In how many ways a parsed expression can match a name: a product over its parts."""
    ways = 1.0
    for kind, value in parsed:
        ways = min(ways * _ways_of(str(kind), value), 2 * _MOST_WAYS)
    return ways


def _ways_of(kind: str, value: Any) -> float:
    if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, body = value
        return _repeated(_ways(body), min(int(least), _LETTERS), min(int(most), _LETTERS))
    if kind == "BRANCH":
        return sum(map(_ways, value[1]))
    if kind == "SUBPATTERN":
        return _ways(value[-1])
    if kind in ("ASSERT", "ASSERT_NOT"):
        return _ways(value[1])
    if kind == "ATOMIC_GROUP":
        return _ways(value)
    if kind == "GROUPREF_EXISTS":
        return sum(_ways(part) for part in value[1:] if part is not None)
    return 1.0


def _repeated(ways: float, least: int, most: int) -> float:
    """The ways of a part that is repeated `least` to `most` times."""
    total, power = 0.0, 1.0
    for count in range(most + 1):
        if count >= least:
            total += power
        power *= ways
        if max(total, power if count < most else 0.0) > 2 * _MOST_WAYS:
            return 2 * _MOST_WAYS
    return total
