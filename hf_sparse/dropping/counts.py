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


def number_of_some(count: int | float, total: int, part: str) -> int:
    """Read a count of parts some of which have to stay, such as `block` or `hidden feature`.

    Raises:
        ValueError: a fraction outside of (0, 1); none of the parts, or all.
    """
    wanted = f"at most {total - 1} of the {total} {part}s, or a fraction of them in (0, 1)"
    number = number_of(count, total, f"{part}s", wanted)
    if number < 1:
        raise ValueError(
            f"count is {count}, which is no {part} of {total}; wanted {wanted}. The smallest "
            f"fraction that is a {part} is {1 / total:.4g}."
        )
    if number >= total:
        raise ValueError(f"count is {count}, which is every {part} of {total}; wanted {wanted}.")
    return number
