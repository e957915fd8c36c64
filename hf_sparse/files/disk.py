"""What becomes of safetensors' errors where a disk is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what safetensors makes of a full disk into an OSError, as Python's own files give."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"the weights cannot be written: {error}") from error
