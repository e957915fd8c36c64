"""Commands that read a checkpoint take the name of a model on the Hub, too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_sparse
from hf_sparse_cli import main
from tests.support.hub_stand_in import HubStandIn, StoredFile
from tests.support.processes import environment
from tests.support.tiny_models import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_model("llama")
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), "magnitude")
    hf_sparse.save_pretrained(model, tmp_path / "sparse")
    return tmp_path / "sparse"


@pytest.mark.slow
def test_inspect_and_report_read_a_model_of_the_hub(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    files = {
        path.name: StoredFile(path.read_bytes(), path.suffix == ".safetensors")
        for path in folder.iterdir()
    }
    with HubStandIn() as hub:
        hub.add_commit("user/tiny", "all of it", files)
        variables = environment(hub.environment(tmp_path / "home"))

        def told(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "hf_sparse_cli", *arguments]
            return subprocess.run(
                command, capture_output=True, text=True, check=False, env=variables, cwd=tmp_path
            )

        read = told("inspect", "user/tiny", "--json")
        page = told("report", "user/tiny", "--html", "page.html")
        none = told("inspect", "user/none")
    assert read.returncode == 0, read.stderr
    assert sum(tensor["zeros"] for tensor in json.loads(read.stdout)["report"]["tensors"]) > 0
    assert page.returncode == 0, page.stderr
    assert "page.html: 1 model, " in page.stdout
    assert none.returncode == 1
    assert "user/none is no folder here, and the Hub does not give it" in none.stderr


def test_a_path_is_no_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("none", "./none", "a/b/c"):
        assert main(["inspect", path]) == 1
        assert f"no such folder: {path}" in capsys.readouterr().err
