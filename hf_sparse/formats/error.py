"""The error of a checkpoint that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class FormatError(ValueError):
    """A compressed tensor or checkpoint does not hold what it promises.

    The message names what was found, what was wanted, and the tensor and file.
    """


@contextmanager
def locate(place: str) -> Iterator[None]:
    """Prefix the FormatErrors raised inside with the place they come from."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{place}: {error}") from error
