"""Proves the stand-in for the Hub with the real client libraries, each in a fresh process."""

from pathlib import Path

import pytest

from tests.support.hub_stand_in import HubStandIn
from tests.support.processes import run


def run_client(hub: HubStandIn, program: str, tmp_path: Path, *arguments: Path) -> None:
    result = run(program, *arguments, variables=hub.environment(tmp_path / "home"))
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_pushed_model_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with HubStandIn() as hub:
        run_client(hub, "push_and_pull", tmp_path, folder)
        files = hub.files("user/tiny")
        assert hub.repos["user/tiny"][-1].files["model.safetensors"].large
        assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        assert files["config.json"] == (folder / "config.json").read_bytes()
        assert "onnx/x.txt" not in files
        assert hub.commits("user/tiny") == ["initial commit", "Add the model", "Remove a file"]


@pytest.mark.slow
def test_what_is_missing_raises_the_clients_errors(tmp_path: Path) -> None:
    with HubStandIn(lfs=False) as hub:
        run_client(hub, "ask_for_what_is_missing", tmp_path)
        assert list(hub.files("user/empty")) == [".gitattributes"]
