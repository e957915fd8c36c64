"""Some kills and failing system calls; `make kill-tests` tries more of them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.faults import system_calls
from tests.faults.kills import LostError, finish, kill
from tests.faults.operations import OPERATIONS, Operation

needs_gcc = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="wants Linux and gcc"
)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("recipe", 2),
        *(pytest.param(name, 20, marks=pytest.mark.slow) for name in OPERATIONS),
    ],
)
def test_kills_lose_nothing(name: str, count: int, tmp_path: Path) -> None:
    counts = kill(name, tmp_path, count)
    assert sum(counts.values()) == count


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_failing_call_is_told_and_loses_nothing(name: str) -> None:
    every = "1" if name in ("recipe", "gguf", "save-compiled") else "5"
    assert system_calls.run_with_shim(["--operation", name, "--every", every]) == 0


def test_what_is_left_behind_is_found(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        (folder / "model").write_text("new")
        (folder / "model.tmp").write_text("left")

    careless = Operation(lambda folder: None, work, lambda folder: (folder / "model").read_text())
    with pytest.raises(LostError, match=r"leaves \['model.tmp'\]"):
        finish(careless, tmp_path, "new")
    with pytest.raises(LostError, match="gives new; wanted other"):
        finish(careless, tmp_path, "other")
