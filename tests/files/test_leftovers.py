"""What kills leave of files and work folders goes with the next run, and nothing else does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hf_sparse.files.atomic import lock
from hf_sparse.files.single import replacing_file, write_file
from hf_sparse.files.work_folder import is_stopped, work_folder

RUN = {"method": "wanda"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def left_behind(file: Path) -> Path:
    """What a process leaves that is killed while it writes."""
    fresh = file.with_name(f".{file.name}.saving-abcd_123")
    fresh.write_text("half")
    return fresh


def test_the_next_writer_removes_what_a_kill_left(tmp_path: Path) -> None:
    file = tmp_path / "model[1].gguf"
    left_behind(file)
    write_file(file, b"new")
    assert names(tmp_path) == [file.name]
    left_behind(file)
    with replacing_file(file) as fresh:
        fresh.write_text("newer")
    assert names(tmp_path) == [file.name]
    assert file.read_text() == "newer"


def test_a_file_that_is_being_written_stays(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with replacing_file(file) as slow:
        slow.write_text("slow")
        child = os.fork()
        if child == 0:  # another process: its locks are its own
            write_file(file, b"fast")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert file.read_text() == "fast"
        assert slow.exists()
    assert file.read_text() == "slow"
    assert names(tmp_path) == ["model.gguf"]


def test_files_that_look_alike_stay(tmp_path: Path) -> None:
    mine = [".model.gguf.saving-notes", ".model.gguf.saving-ABCD1234", ".other.saving-abcd1234"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".model.gguf.saving-aaaaaaaa").symlink_to(tmp_path / mine[0])
    write_file(tmp_path / "model.gguf", b"new")
    assert set(mine) < set(names(tmp_path))
    assert (tmp_path / ".model.gguf.saving-aaaaaaaa").is_symlink()


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("old")

    def fail(fresh: Path) -> None:
        fresh.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"), replacing_file(file) as fresh:
        fail(fresh)
    assert (names(tmp_path), file.read_text()) == (["model.gguf"], "old")


def test_a_work_folder_that_was_only_made_is_no_stopped_run(tmp_path: Path) -> None:
    work = tmp_path / "model.unfinished"
    work.mkdir()
    left_behind(work / "run.json")
    with work_folder(tmp_path / "model", RUN, resume=False) as found:
        assert json.loads((found / "run.json").read_text()) == RUN
    assert names(tmp_path) == []


def test_a_work_folder_that_was_being_removed_goes(tmp_path: Path) -> None:
    done = tmp_path / ".model.finished"
    (done / "blocks").mkdir(parents=True)
    (done / "block-1.safetensors").write_text("left")
    with work_folder(tmp_path / "model", RUN, resume=False):
        assert is_stopped(tmp_path / "model")
    assert names(tmp_path) == []


def test_a_work_folder_in_use_is_refused(tmp_path: Path) -> None:
    work = tmp_path / "model.unfinished"
    with (
        work_folder(tmp_path / "model", RUN, resume=False),
        pytest.raises(ValueError, match="in use by a run that still goes on"),
        work_folder(tmp_path / "model", RUN, resume=True),
    ):
        pass
    work.mkdir()
    (work / "run.json").write_text(json.dumps(RUN))
    held = lock(work)
    assert held is not None
    with (
        pytest.raises(ValueError, match="in use"),
        work_folder(tmp_path / "model", RUN, resume=True),
    ):
        pass
    os.close(held)
