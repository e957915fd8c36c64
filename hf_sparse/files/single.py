"""A single file that is there as a whole or not at all.

It is written under a hidden name and takes its place when it is whole. A process locks the file that it
writes (`flock`): by that the next one that writes there knows those of processes that were killed, and
removes them.
"""

from __future__ import annotations

import glob
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_sparse.files.atomic import lock, made_and_locked, sync_file


@contextmanager
def replacing_file(file: Path) -> Iterator[Path]:
    """Give the name of a hidden file to write; it takes the place of `file` when the block ends.

    Args:
        file: that is to be written, or a link to it.

    Raises:
        OSError: the disk is full, or the folder cannot be written. `file` is as it was then, as after
            any error inside the block.
    """
    file = Path(os.path.realpath(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    with _hidden_file(file) as fresh:
        yield fresh
        fresh.chmod(0o666 & ~_umask())
        _put_in_place(fresh, file)


def write_file(path: Path, content: bytes) -> None:
    """Write a file in a folder that is there, in place of one of that name, which keeps its mode.

    Raises:
        OSError: it cannot be written; what was there is unchanged then.
    """
    with _hidden_file(path) as fresh:
        fresh.write_bytes(content)
        fresh.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        _put_in_place(fresh, path)


def _put_in_place(fresh: Path, file: Path) -> None:
    sync_file(fresh)
    fresh.replace(file)
    sync_file(file.parent)
    _remove_leftovers(file)


@contextmanager
def _hidden_file(file: Path) -> Iterator[Path]:
    """A new file for what `file` is to hold: locked, and removed at the end if it is there still."""
    fresh, held = made_and_locked(lambda: _new_file(file))
    try:
        yield fresh
    finally:
        fresh.unlink(missing_ok=True)
        if held is not None:
            os.close(held)


def _new_file(file: Path) -> Path:
    descriptor, name = tempfile.mkstemp(prefix=_prefix(file), dir=file.parent)
    os.close(descriptor)
    return Path(name)


def _remove_leftovers(file: Path) -> None:
    """Remove the hidden files of processes that were killed, and no file that looks like one."""
    prefix = _prefix(file)
    for path in file.parent.glob(f"{glob.escape(prefix)}*"):
        named = re.fullmatch(r"[a-z0-9_]{8}", path.name.removeprefix(prefix))
        if named and path.is_file() and not path.is_symlink():
            with suppress(OSError):  # another process removes it, or its file system has no locks
                if (held := lock(path)) is not None:
                    path.unlink(missing_ok=True)
                    os.close(held)


def _prefix(file: Path) -> str:
    return f".{file.name}.saving-"


def _umask() -> int:
    """The bits that new files do not get; the system only tells them when they are set."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
