"""Files that only this user can have written: machine code is kept in them, and executed.

A folder is used if it belongs to this user, is no symbolic link, and neither its group nor others
may write it; a new one is made for this user alone. All files are opened inside the opened folder,
so that nobody can put another folder in its place meanwhile. Each begins with a keyed digest of its
name and content; the key is random, lies in the same folder, and only this user can read it: a file
that came from elsewhere is no entry. Nothing here is an error: what cannot be kept is made again.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Below the home folder, which is looked up when the cache is used: some users have none.
DEFAULT_CACHE = Path("~", ".cache", "hf_sparse", "kernels")

_KEY, _KEY_BYTES, _DIGEST_BYTES = "key", 32, 32
_OTHERS_WRITE, _OTHERS = stat.S_IWGRP | stat.S_IWOTH, stat.S_IRWXG | stat.S_IRWXO


def read(folder: Path, name: str) -> bytes | None:
    """What was kept in a folder under a name; None if there is nothing that this user wrote."""
    try:
        with _opened(folder) as place:
            key, data = _read_file(place, _KEY, _OTHERS), _read_file(place, name, _OTHERS_WRITE)
    except OSError:
        return None
    content = data[_DIGEST_BYTES:]
    whole = len(key) == _KEY_BYTES and hmac.compare_digest(
        data[:_DIGEST_BYTES], _digest(key, name, content)
    )
    return content if whole else None


def write(folder: Path, name: str, content: bytes) -> None:
    """Keep something in a folder under a name, atomically; without a word if that cannot be done."""
    with suppress(OSError):
        _make(folder)
        with _opened(folder) as place:
            key = _key(place)
            _write_file(place, name, _digest(key, name, content) + content)


def _digest(key: bytes, name: str, content: bytes) -> bytes:
    return hmac.digest(key, name.encode() + b"\0" + content, "sha256")


def _located(folder: Path) -> Path:
    """The folder's path, `~` replaced.

    Raises:
        OSError: this user has no home folder.
    """
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from error


def _make(folder: Path) -> None:
    """Make a folder, and those above that are missing, for this user alone, whatever the umask."""
    folder = _located(folder)
    if not folder.is_dir():
        _make(folder.parent)
        with suppress(FileExistsError):  # another process was faster
            folder.mkdir(mode=stat.S_IRWXU)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """A descriptor of the folder.

    Raises:
        OSError: it is not there, or not this user's alone (a warning tells so).
    """
    if os.open not in os.supports_dir_fd:
        raise OSError("this system opens no files inside an opened folder")
    path = _located(folder)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        place = os.open(path, flags)
    except OSError:
        if path.is_symlink():
            _warn(path, "it is a symbolic link")
        raise
    try:
        status = os.fstat(place)
        if status.st_uid != os.geteuid():
            _refuse(path, f"it belongs to the user {status.st_uid}, not to {os.geteuid()}")
        if status.st_mode & _OTHERS_WRITE:
            _refuse(path, "others than its owner may write it: chmod 700 it, or delete it")
        yield place
    finally:
        os.close(place)


def _warn(path: Path, reason: str) -> None:
    warnings.warn(
        f"the cache of machine code {path} is not used, since {reason}. Code in it would be executed; "
        "wanted a folder that this user owns and alone may write. The kernels are compiled anew.",
        stacklevel=2,
    )


def _refuse(path: Path, reason: str) -> None:
    _warn(path, reason)
    raise PermissionError(f"{path}: {reason}")


def _read_file(place: int, name: str, forbidden: int) -> bytes:
    """A file of the folder.

    Raises:
        OSError: it is not there, is no plain file, is another user's, or has forbidden modes.
    """
    # O_NONBLOCK: a named pipe would wait for somebody to write into it.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=place), "rb") as file:
        status = os.fstat(file.fileno())
        own = status.st_uid == os.geteuid() and not status.st_mode & forbidden
        if not own or not stat.S_ISREG(status.st_mode):
            raise PermissionError(f"{name} is no plain file that only this user can have written")
        return file.read()


def _write_file(place: int, name: str, data: bytes) -> None:
    """Write a file of the folder, whole or not at all."""
    temporary = f".{name[:8]}-{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        mode = stat.S_IRUSR | stat.S_IWUSR
        with open(os.open(temporary, flags, mode, dir_fd=place), "wb") as file:
            file.write(data)
        os.replace(temporary, name, src_dir_fd=place, dst_dir_fd=place)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=place)
        raise


def _key(place: int) -> bytes:
    """The folder's key; a new one where there is none that only this user knows.

    Two processes that make one at the same time may leave entries of the key that was replaced;
    these are no entries then, and made again.
    """
    for attempt in range(2):
        with suppress(OSError):
            key = _read_file(place, _KEY, _OTHERS)
            if len(key) == _KEY_BYTES:
                return key
        if not attempt:
            _write_file(place, _KEY, secrets.token_bytes(_KEY_BYTES))
    raise PermissionError("the folder keeps no key")
