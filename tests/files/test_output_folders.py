"""Calls from disk to disk replace a model only where that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

import hf_sparse
from hf_sparse.pruning import on_disk, streaming
from tests.support.tiny_models import tiny_batches, tiny_model

CONFIG = hf_sparse.SparsityConfig("2:4")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["a dense model", "an earlier output", "a note"])
def test_a_streamed_pruning_never_replaces_a_folder_unasked(
    dense: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if kind == "a dense model":
        tiny_model("llama").save_pretrained(out)
    elif kind == "an earlier output":
        hf_sparse.prune_checkpoint(dense, out, CONFIG, "wanda", tiny_batches("llama"))
    else:
        out.mkdir()
        (out / "note.txt").write_text("mine")
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_load", None)  # it is refused before the model is read
        with pytest.raises(ValueError, match=r"is not empty: it holds .*overwrite=True"):
            hf_sparse.prune_checkpoint(dense, out, CONFIG, "wanda", tiny_batches("llama"))
    assert contents(out) == before
    hf_sparse.prune_checkpoint(dense, out, CONFIG, "wanda", tiny_batches("llama"), overwrite=True)
    assert hf_sparse.inspect_checkpoint(out).report.sparsity == 0.5
    if kind == "a note":
        assert (out / "note.txt").read_text() == "mine"


def test_a_run_that_may_overwrite_is_resumed_without_asking_again(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, batches = tmp_path / "out", tiny_batches("llama")
    tiny_model("llama").save_pretrained(out)
    finish = on_disk.OnDisk.finish

    def stopping(self, step) -> None:
        finish(self, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(on_disk.OnDisk, "finish", stopping)
        with pytest.raises(KeyboardInterrupt):
            hf_sparse.prune_checkpoint(dense, out, CONFIG, "wanda", batches, overwrite=True)
    hf_sparse.prune_checkpoint(dense, out, CONFIG, "wanda", batches, resume=True)
    assert hf_sparse.inspect_checkpoint(out).report.sparsity == 0.5
