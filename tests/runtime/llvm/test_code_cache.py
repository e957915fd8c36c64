"""The cache of machine code: only what this user wrote is executed, and nothing is an error."""

from __future__ import annotations

import hashlib
import hmac
import os
import pwd
import resource
import signal
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hf_sparse.runtime.kernels import tiles
from hf_sparse.runtime.llvm import code_cache, jit, target

NAME = "a" * 64
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder that keeps one entry."""
    folder = tmp_path / "above" / "kernels"
    code_cache.write(folder, NAME, b"code")
    return folder


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_an_entry_comes_back_and_only_its_user_can_write_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = tmp_path / "above" / "kernels"
        code_cache.write(folder, NAME, b"code")
    finally:
        os.umask(before)
    assert code_cache.read(folder, NAME) == b"code"
    assert [mode(path) for path in (folder.parent, folder)] == [0o700, 0o700]
    assert {path.name: mode(path) for path in folder.iterdir()} == {NAME: 0o600, "key": 0o600}
    assert code_cache.read(folder, "b" * 64) is None
    code_cache.write(folder, NAME, b"other")
    assert code_cache.read(folder, NAME) == b"other"


def test_an_entry_without_the_key_is_none(cache: Path) -> None:
    content = b"evil"
    plain = hashlib.sha256(NAME.encode() + content).digest()
    guessed = hmac.digest(bytes(32), NAME.encode() + b"\0" + content, "sha256")
    for digest in (plain, guessed, b""):
        (cache / NAME).write_bytes(digest + content)
        assert code_cache.read(cache, NAME) is None


def test_an_entry_of_another_name_or_another_key_is_none(cache: Path, tmp_path: Path) -> None:
    (cache / ("b" * 64)).write_bytes((cache / NAME).read_bytes())
    assert code_cache.read(cache, "b" * 64) is None
    code_cache.write(tmp_path / "other", NAME, b"code")
    (cache / "key").write_bytes((tmp_path / "other" / "key").read_bytes())
    assert code_cache.read(cache, NAME) is None


@pytest.mark.parametrize("name", [NAME, "key"])
@pytest.mark.parametrize("how", ["writable", "linked", "pipe", "folder", "cut"])
def test_a_file_that_others_can_have_made_is_none(cache: Path, name: str, how: str) -> None:
    file = cache / name
    if how == "writable":
        file.chmod(0o620)
    elif how == "linked":
        file.symlink_to(file.rename(cache / "elsewhere"))
    elif how == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
        os.mkfifo(file) if how == "pipe" else file.mkdir()
    signal.alarm(20)  # a pipe must not be waited for
    try:
        assert code_cache.read(cache, NAME) is None
        code_cache.write(cache, NAME, b"code")
    finally:
        signal.alarm(0)
    assert code_cache.read(cache, NAME) == (None if how == "folder" else b"code")
    assert not list(cache.glob(".*"))


def test_a_key_that_others_read_is_replaced(cache: Path) -> None:
    key = (cache / "key").read_bytes()
    (cache / "key").chmod(0o644)
    assert code_cache.read(cache, NAME) is None
    code_cache.write(cache, NAME, b"code")
    assert (cache / "key").read_bytes() != key
    assert code_cache.read(cache, NAME) == b"code"


def give_away(path: Path) -> None:
    if not IS_ROOT:
        pytest.skip("only root gives files away")
    os.chown(path, 1000, 1000)


def linked(folder: Path) -> None:
    folder.symlink_to(folder.rename(folder.with_name("elsewhere")))


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "group": (lambda folder: folder.chmod(0o770), "chmod 700"),
    "others": (lambda folder: folder.chmod(0o777), "chmod 700"),
    "sticky": (lambda folder: folder.chmod(0o1777), "chmod 700"),
    "owner": (give_away, "belongs to the user 1000"),
    "link": (linked, "symbolic link"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_others_can_write_is_not_used_and_a_warning_says_why(
    cache: Path, name: str
) -> None:
    change, message = FOLDERS[name]
    change(cache)
    before = sorted(cache.iterdir())
    with pytest.warns(UserWarning, match=f"is not used.*{message}"):
        assert code_cache.read(cache, NAME) is None
    with pytest.warns(UserWarning, match=message):
        code_cache.write(cache, "b" * 64, b"code")
    assert sorted(cache.iterdir()) == before


def test_an_entry_of_another_user_is_none(cache: Path) -> None:
    give_away(cache / NAME)
    assert code_cache.read(cache, NAME) is None


def test_kernels_of_others_are_not_executed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is writable, and has a right entry: it is compiled anew, and works."""
    chosen = target.host()
    functions = [tiles.copy(chosen)]
    jit.compile_kernels(functions, chosen, cache)
    cache.chmod(0o777)
    compiled = []
    real = jit._compile
    monkeypatch.setattr(jit, "_compile", lambda *given: compiled.append(1) or real(*given))
    with pytest.warns(UserWarning, match="chmod 700"):
        assert jit.compile_kernels(functions, chosen, cache).addresses["copy"]
    cache.chmod(0o700)
    jit.compile_kernels(functions, chosen, cache)
    assert len(compiled) == 1


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    code_cache.write(code_cache.DEFAULT_CACHE, NAME, b"code")
    assert code_cache.read(code_cache.DEFAULT_CACHE, NAME) is None


def test_the_home_folder_is_looked_up_when_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    code_cache.write(code_cache.DEFAULT_CACHE, NAME, b"code")
    assert code_cache.read(tmp_path / ".cache/hf_sparse/kernels", NAME) == b"code"


def test_a_full_disk_leaves_nothing(cache: Path) -> None:
    """A limit on the size of files fails as a full disk does, in the middle of a write."""
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        code_cache.write(cache, NAME, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before


@pytest.mark.skipif(IS_ROOT, reason="root may write everything")
def test_a_read_only_cache_is_read(cache: Path) -> None:
    cache.chmod(0o500)
    assert code_cache.read(cache, NAME) == b"code"
    code_cache.write(cache, NAME, b"other")
    assert code_cache.read(cache, NAME) == b"code"


def test_where_no_folder_can_be_there_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "kernels", Path("/proc/none/kernels")):
        code_cache.write(folder, NAME, b"code")
        assert code_cache.read(folder, NAME) is None


def test_two_processes_share_a_new_cache(tmp_path: Path) -> None:
    """Both write at once, over and over; in the end every entry is right or written anew."""
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            for turn in range(50):
                code_cache.write(tmp_path / "new", f"{turn:064}", b"code" * 1000)
            os._exit(number)
        children.append(child)
    assert [os.waitpid(child, 0)[1] >> 8 for child in children] == [0, 1]
    found = {code_cache.read(tmp_path / "new", f"{turn:064}") for turn in range(50)}
    assert found <= {None, b"code" * 1000}
    assert b"code" * 1000 in found
    assert not list((tmp_path / "new").glob(".*"))
