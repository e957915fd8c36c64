"""The files of a checkpoint folder: JSON, names, links, and what saving removes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import FormatError, SparsityConfig
from hf_sparse.checkpoint.index import INDEX_NAME
from hf_sparse.cli import main
from hf_sparse.files.links import check_links
from tests.checkpoint.test_legacy import sparse_llama, write_legacy
from tests.support.tiny_models import tiny_batches, tiny_model

DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


def sharded(folder: Path) -> Path:
    model = tiny_model("llama")
    return hf_sparse.save_pretrained(
        model, folder, SparsityConfig("unstructured", 0.0), max_shard_size="20KB"
    )


def dense(folder: Path) -> Path:
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    return folder


def legacy(folder: Path) -> Path:
    return write_legacy(folder, sparse_llama(), sharded=True)


def stream(folder: Path) -> None:
    hf_sparse.prune_checkpoint(
        folder, folder.parent / "out", SparsityConfig("2:4"), batches=tiny_batches("llama")
    )


READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "inspect_checkpoint": (sharded, hf_sparse.inspect_checkpoint),
    "from_pretrained": (sharded, AutoModelForCausalLM.from_pretrained),
    "convert_legacy": (
        legacy,
        lambda folder: hf_sparse.convert_legacy(folder, folder.parent / "out"),
    ),
    "prune_checkpoint": (dense, stream),
}
BAD_NAMES = [
    7,
    [],
    None,
    "A" * 5000,
    "A" * 5000 + ".safetensors",
    "model\0.safetensors",
    "..",
    "../model.safetensors",
    "/etc/model.safetensors",
    "..\\model.safetensors",
    "\ud800.safetensors",
    "model.bin",
]


@pytest.mark.parametrize("reader", READERS)
def test_indices_that_name_no_files_of_the_folder_are_refused(tmp_path: Path, reader: str) -> None:
    make, read = READERS[reader]
    index = make(tmp_path / "model") / INDEX_NAME
    original = index.read_text()
    first = next(iter(json.loads(original)["weight_map"]))
    for name in BAD_NAMES:
        values = json.loads(original)
        values["weight_map"][first] = name
        index.write_text(json.dumps(values))
        with pytest.raises(FormatError, match="weight_map does not map tensors to files"):
            read(index.parent)
    for text in (DEEP, "[]", "{", '{"weight_map": []}', '{"weight_map": {}}'):
        index.write_text(text)
        with pytest.raises(FormatError, match=INDEX_NAME):
            read(index.parent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [DEEP, "[]", "{", "\udcff"])
def test_configs_that_are_no_objects_are_refused(tmp_path: Path, text: str) -> None:
    for make, read in (
        (sharded, hf_sparse.inspect_checkpoint),
        (sharded, hf_sparse.SparseLlamaForCausalLM.from_pretrained),
        READERS["convert_legacy"],
        READERS["prune_checkpoint"],
    ):
        folder = tmp_path / read.__name__
        make(folder)
        (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(FormatError, match=r"config.json is no JSON object"):
            read(folder)


def test_a_folder_in_place_of_the_weights_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(FormatError, match=r"neither model.safetensors nor"):
        hf_sparse.inspect_checkpoint(folder)
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("layout", [[4, 0, 1, 4, 2**62], [0, 4, 0, 2**31, 2**31], [4, 4, 0, -4, 4]])
def test_layouts_with_huge_blocks_are_refused(layout: list[int]) -> None:
    parts = {
        "": torch.zeros(0),
        "block": torch.zeros(0, dtype=torch.uint8),
        "layout": torch.tensor(layout),
    }
    with pytest.raises(FormatError, match="no layout of 'block'"):
        hf_sparse.formats.decompress(parts)


def test_links_out_of_a_folder_are_not_copied(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder = legacy(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "vocab.json").symlink_to("tokenizer.json")
    hf_sparse.convert_legacy(folder, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.json").read_text() == "{}"
    (folder / "vocab.txt").symlink_to(secret)
    with pytest.raises(ValueError, match=r"vocab.txt is a link to .*secret, out of its folder"):
        hf_sparse.convert_legacy(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_cached_repository_of_the_hub_is_copied(tmp_path: Path) -> None:
    """Its files are links to blobs, and it may be reached through a link itself."""
    repository = tmp_path / "hub" / "models--me--model"
    snapshot = repository / "snapshots" / "1234"
    snapshot.parent.mkdir(parents=True)
    legacy(snapshot)
    (snapshot / "tokenizer.json").write_text("{}")
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repository / "blobs" / str(number))
        path.symlink_to(f"../../blobs/{number}")
    (tmp_path / "link").symlink_to(snapshot)
    hf_sparse.convert_legacy(tmp_path / "link", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    check_links(snapshot)
    (snapshot / "vocab.txt").symlink_to(tmp_path / "hub" / "token")
    with pytest.raises(ValueError, match="out of its folder"):
        check_links(snapshot)


def test_a_folder_with_links_out_of_it_is_not_pushed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sharded(tmp_path / "model")
    (tmp_path / "secret").write_text("secret")
    (folder / "notes").mkdir()
    (folder / "notes" / "vocab.txt").symlink_to(tmp_path / "secret")
    assert main(["push", str(folder), "me/model"]) != 0
    assert "out of its folder" in capsys.readouterr().err


def refuse(message: str, **kwargs: Any) -> None:
    raise UserWarning(message)


def test_saving_tells_which_weights_it_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = tiny_model("llama"), SparsityConfig("unstructured", 0.0)
    (tmp_path / "pytorch_model.bin").write_text("mine")
    (tmp_path / "notes.bin").write_text("mine")
    with warnings.catch_warnings():  # a variant replaces only itself
        warnings.simplefilter("error")
        hf_sparse.save_pretrained(model, tmp_path, config, variant="fp16")
    monkeypatch.setattr("warnings.warn", refuse)
    with pytest.raises(UserWarning, match=r"pytorch_model.bin"):
        hf_sparse.save_pretrained(model, tmp_path, config)
    monkeypatch.undo()
    assert (tmp_path / "pytorch_model.bin").read_text() == "mine"
    with pytest.warns(UserWarning, match="holds the weights pytorch_model.bin. They are removed"):
        hf_sparse.save_pretrained(model, tmp_path, config)
    assert not (tmp_path / "pytorch_model.bin").exists()
    assert (tmp_path / "notes.bin").read_text() == "mine"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_sparse.save_pretrained(model, tmp_path, config)


def test_saving_tells_that_a_foreign_card_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.warns(UserWarning, match=r"README.md is no card .* was not written.*move"):
        hf_sparse.save_pretrained(
            tiny_model("llama"), tmp_path, SparsityConfig("unstructured", 0.0)
        )
    assert (tmp_path / "README.md").read_text() == "mine"
