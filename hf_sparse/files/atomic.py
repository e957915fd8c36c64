"""Replacing a folder's files so that a kill at any moment leaves the old ones or the new ones.

The new files are written and synced into a hidden folder first. Then, in one step:

- a folder that does not exist yet is renamed into place;
- one that holds a model is exchanged with the new one (Linux `renameat2`), into which its other
  files were hard-linked before;
- one without a model gets the files moved in, `config.json` (of a compiled model `compiled.json`)
  last: nothing loads without it.

A folder that holds sub-folders, that is the working directory or a mount point, or that lies on a
system without `renameat2`, gets its files moved in one by one, `config.json` last: each file is
whole, and nothing else is touched, but a kill between two moves may leave old files beside new ones.

The hidden folder holds a marker and a folder `files`, which is what takes the place of the old one.
A process locks its hidden folder (`flock`) until it is done. The system unlocks it when a process is
killed: by that the next one that saves there knows which of those with a marker are left over, and
removes them when its own files are in place. Where the file system has no locks they stay.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

# Without these nothing loads, neither a checkpoint nor a compiled model.
_COMMIT_FILES = ("config.json", "compiled.json")
_MARKER, _FILES = ".of-hf_sparse", "files"
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


@contextmanager
def replacing(folder: Path, is_stale: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """Give an empty folder to write in; its files replace those of `folder` when the block ends.

    Args:
        folder: where the files are to be, or a link to it. Other files in it stay.
        is_stale: whether a file of that name in `folder` is to be removed, unless written anew.

    Raises:
        OSError: the disk is full, or the folder or its parent cannot be written. Nothing in
            `folder` has changed then, as after any error inside the block.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; wanted a folder to save the model in")
    parent = folder if folder.exists() and not _can_exchange(folder) else folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    with _hidden_folder(parent, folder.name) as fresh:
        yield fresh
        sync(fresh)
        _put_in_place(fresh, folder, is_stale)
        sync_file(folder.parent)
    for place in (folder, folder.parent):
        _remove_leftovers(place, folder.name)


@contextmanager
def _hidden_folder(parent: Path, name: str) -> Iterator[Path]:
    """An empty folder for the new files of the folder `name`: locked, and removed at the end."""
    hidden, held = made_and_locked(lambda: Path(tempfile.mkdtemp(prefix=_prefix(name), dir=parent)))
    try:
        (hidden / _MARKER).touch()
        (hidden / _FILES).mkdir()
        yield hidden / _FILES
    finally:
        _remove(hidden)
        if held is not None:
            os.close(held)


def _remove_leftovers(place: Path, name: str) -> None:
    """Remove the hidden folders of processes that were killed, and no folder that looks like one."""
    for path in place.glob(f"{glob.escape(_prefix(name))}*"):
        with suppress(OSError):  # another process removes it, or its file system has no locks
            if path.is_symlink() or (held := lock(path)) is None:
                continue
            if _is_hidden_folder(path):
                _remove(path)
            os.close(held)


def _is_hidden_folder(path: Path) -> bool:
    """Whether a folder was made by `_hidden_folder`; one that is empty was not yet marked."""
    entries = set(os.listdir(path))
    if not entries:
        return re.search(r"\.saving-[a-z0-9_]{8}$", path.name) is not None
    return _MARKER in entries and entries <= {_MARKER, _FILES}


def _remove(hidden: Path) -> None:
    """Remove a hidden folder, its marker last: what a kill leaves of it is known as such."""
    with suppress(OSError):  # what cannot be removed stays until another process saves here
        if (hidden / _FILES).exists():
            shutil.rmtree(hidden / _FILES)
        (hidden / _MARKER).unlink(missing_ok=True)
        hidden.rmdir()


def made_and_locked(make: Callable[[], Path]) -> tuple[Path, int | None]:
    """A new hidden file or folder, and the descriptor of its lock; None: the file system has none."""
    while True:
        hidden = make()
        try:
            held = lock(hidden)
        except OSError:  # no locks here: nobody will take it for a leftover
            return hidden, None
        if held is not None:  # else in this moment another process has taken it for one
            return hidden, held


def lock(path: Path) -> int | None:
    """Lock a folder or a file until the descriptor is closed or the process ends.

    Returns:
        The descriptor; None if another process has locked or removed it.

    Raises:
        OSError: the file system has no locks.
    """
    if fcntl is None:
        raise OSError("this system has no flock")
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(path):
            return descriptor
    except BlockingIOError:
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _prefix(name: str) -> str:
    return f".{name}.saving-"


def sync(folder: Path) -> None:
    """Force the files of a folder, and the folder, to the disk."""
    for path in folder.rglob("*"):
        sync_file(path)
    sync_file(folder)


def _put_in_place(fresh: Path, folder: Path, is_stale: Callable[[str], bool]) -> None:
    if not folder.exists():
        try:
            fresh.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise  # else another process has made the folder since
    if _can_exchange(folder):
        _exchange(fresh, folder, is_stale)
    else:
        _move_in(fresh, folder, is_stale)


def _exchange(fresh: Path, folder: Path, is_stale: Callable[[str], bool]) -> None:
    written = {path.name for path in fresh.iterdir()}
    for path in folder.iterdir():
        if path.name not in written and not is_stale(path.name):
            os.link(path, fresh / path.name, follow_symlinks=False)
    shutil.copymode(folder, fresh)
    sync_file(fresh)
    _rename_exchange(fresh, folder)


def _move_in(fresh: Path, folder: Path, is_stale: Callable[[str], bool]) -> None:
    files = [path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda file: (file.name in _COMMIT_FILES, file)):
        (folder / file).parent.mkdir(exist_ok=True)
        os.replace(fresh / file, folder / file)
    for path in list(folder.iterdir()):
        if Path(path.name) not in files and path.is_file() and is_stale(path.name):
            path.unlink()
    sync_file(folder)


def _can_exchange(folder: Path) -> bool:
    """Whether `folder` holds a model and files alone, and its file system exchanges folders (tried)."""
    if not any((folder / name).exists() for name in _COMMIT_FILES):
        return False
    if os.path.ismount(folder) or not os.access(folder.parent, os.W_OK):
        return False
    if folder.samefile(os.curdir) or any(path.is_dir() for path in folder.iterdir()):
        return False
    parent, name = folder.parent, folder.name
    with _hidden_folder(parent, name) as first, _hidden_folder(parent, name) as second:
        try:
            _rename_exchange(first, second)
        except OSError:
            return False
    return True


def _rename_exchange(first: Path, second: Path) -> None:
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError("this system has no renameat2")
    paths = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(second))


def sync_file(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
