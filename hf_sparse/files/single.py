"""A single file that is there as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hf_sparse.files.atomic import sync_file


def write_file(path: Path, content: bytes) -> None:
    """Write a file in a folder that is there, in place of one of that name.

    Raises:
        OSError: it cannot be written; what was there is unchanged then.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    fresh = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        fresh.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        sync_file(fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _umask() -> int:
    """The mask that new files get; the system only tells it when it is set."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
