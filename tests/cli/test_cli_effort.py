"""`hf-sparse prune --effort` and `--recipe`: plan, save, repeat, and go on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from hf_sparse.effort.work import KeptBlocks
from hf_sparse_cli import main
from tests.support.closeness import nearly_same
from tests.support.dense_folders import dense_folder


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return dense_folder(tmp_path)


def prune(dense: Path, output: str, *more: str) -> int:
    data = ["--calibration", str(dense.parent / "text.txt"), "--window", "32"]
    return main(["prune", str(dense), str(dense.parent / output), *data, *more])


@pytest.mark.slow
def test_an_effort_its_recipe_and_its_card(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = dense.parent
    recipe = str(folder / "recipe.json")
    effort = ("--pattern", "2:4", "--effort", "minutes")
    assert prune(dense, "first", *effort, "--save-recipe", recipe) == 0
    told = capsys.readouterr().out
    assert "estimated from a short measurement" in told
    assert "pattern 2:4" in told
    assert "option recipe" in (folder / "first" / "README.md").read_text()
    assert prune(dense, "second", "--recipe", recipe) == 0
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder / name).state_dict()
        for name in ("first", "second")
    )
    for name, tensor in first.items():
        assert nearly_same(tensor, second[name])
    assert prune(dense, "third", "--recipe", recipe, "--num-samples", "3") == 1
    assert "and the data have 3" in capsys.readouterr().err


def test_an_interrupted_effort_goes_on(
    dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    effort = ("--pattern", "2:4", "--effort", "seconds")
    finish = KeptBlocks.finish

    def stopping(self: Any, step: Any) -> None:
        finish(self, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KeptBlocks, "finish", stopping)
        assert prune(dense, "out", *effort) == 130
    assert "the same command with --resume goes on from there" in capsys.readouterr().err
    assert prune(dense, "out", *effort) == 1
    assert "a run was stopped. Go on with it by --resume" in capsys.readouterr().err
    assert prune(dense, "out", *effort, "--resume") == 0
    assert (dense.parent / "out" / "config.json").exists()
    assert not (dense.parent / "out.unfinished").exists()
