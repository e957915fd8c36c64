"""Uploads that are refused or break off: nothing is half published, and the reason is told."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.cli import main, pushing
from tests.support import hub_stand_in
from tests.support.hub_stand_in import HubError, HubStandIn
from tests.support.tiny_models import tiny_model


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in that takes large files by Git LFS; the client does not wait between its tries."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(hub_stand_in._Server, "handle_error", lambda *about: None)
    with HubStandIn() as hub:
        api = HfApi(endpoint=hub.endpoint, token="hf_dummy")
        monkeypatch.setattr(pushing, "HfApi", lambda: api)
        monkeypatch.setattr(pushing, "check_can_push", lambda repo_id: None)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of several weight files."""
    model = tiny_model("llama")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    hf_sparse.save_pretrained(model, tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


def test_an_upload_that_breaks_off_publishes_nothing_and_goes_on(
    hub: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uploaded: list[str] = []
    whole = hub_stand_in._Handler.lfs_upload

    def until_it_breaks(self: Any, oid: str) -> Any:
        if len(uploaded) == 2:
            self.connection.shutdown(socket.SHUT_RDWR)
            raise HubError(500, "gone")
        uploaded.append(oid)
        return whole(self, oid)

    routes = hub_stand_in.ROUTES
    monkeypatch.setattr(hub_stand_in, "ROUTES", with_upload(routes, until_it_breaks))
    assert main(["push", str(folder), "user/new"]) == 1
    told = capsys.readouterr().err
    assert "could not be reached" in told
    assert "The same command again goes on" in told
    assert set(hub.files("user/new")) == {".gitattributes"}  # the repository, and nothing in it

    def counted(self: Any, oid: str) -> Any:
        uploaded.append(oid)
        return whole(self, oid)

    monkeypatch.setattr(hub_stand_in, "ROUTES", with_upload(routes, counted))
    assert main(["push", str(folder), "user/new"]) == 0
    files = {path.name for path in folder.iterdir()}
    assert set(hub.files("user/new")) == {*files, ".gitattributes"}
    # What was there already was not sent again.
    assert len(uploaded) == len(set(uploaded)) == len(list(folder.glob("*.safetensors")))


def with_upload(routes: Any, endpoint: Any) -> Any:
    """The routes of the stand-in, with another end of the upload of large files."""
    return tuple((m, p, endpoint if p.startswith("/lfs/") else e) for m, p, e in routes)


@pytest.mark.parametrize("refused", ["/api/repos/create", "/commit/"])
def test_a_token_without_the_permission_is_refused(
    refused: str,
    hub: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def forbidden(self: Any, **about: str) -> Any:
        raise HubError(403, "Forbidden: you don't have the rights to write to this repository")

    routes = tuple((m, p, forbidden if refused in p else e) for m, p, e in hub_stand_in.ROUTES)
    monkeypatch.setattr(hub_stand_in, "ROUTES", routes)
    assert main(["push", str(folder), "user/new"]) == 1
    told = capsys.readouterr().err
    assert "Forbidden" in told
    assert "Traceback" not in told
    assert "user/new" not in hub.repos or set(hub.files("user/new")) == {".gitattributes"}


def test_without_a_token_nothing_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_sparse.hub.get_token", lambda: None)
    assert main(["push", str(folder), "user/new"]) == 1
    assert "needs a token of the Hub that may write" in capsys.readouterr().err
