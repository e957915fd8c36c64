"""How many parts a number, or a fraction of them, means."""

from __future__ import annotations


def number_of(count: int | float, total: int, parts: str, wanted: str) -> int:
    """Read a count; whether so many can go is the caller's to check.

    Args:
        count: a number of parts, or a fraction of all of them, which is rounded.
        total: how many there are.
        parts: what they are called, such as `blocks`.
        wanted: what is allowed, for errors.

    Raises:
        ValueError: a fraction outside of (0, 1).
    """
    if isinstance(count, float) and not 0 < count < 1:
        raise ValueError(f"count is {count}; wanted {wanted}. A number of {parts} is a whole one.")
    return round(count * total) if isinstance(count, float) else count
