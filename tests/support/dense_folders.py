"""Folders of dense models with their tokenizers, and texts beside them, for command lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hf_sparse
from hf_sparse_cli import main
from tests.support.tiny_models import prose, tiny_model, tiny_tokenizer


def dense_folder(folder: Path, model: Any = None, characters: int = 4000) -> Path:
    """Save a model and its tokenizer in `folder/dense`, and a text in `folder/text.txt`.

    Args:
        folder: of the test.
        model: to be saved; None: a tiny Llama.
        characters: of the text.

    Returns:
        The folder of the model.
    """
    dense = folder / "dense"
    (model or tiny_model("llama")).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    (folder / "text.txt").write_text(prose()[:characters])
    return dense


def sparse_folders(folder: Path) -> None:
    """Save two pruned Llamas, with their tokenizers, in `folder/dense` and in `folder/sparse`."""
    for name, seed in (("dense", 1), ("sparse", 0)):
        model = tiny_model("llama", seed)
        hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), "magnitude")
        hf_sparse.save_pretrained(model, folder / name, tokenizer=tiny_tokenizer())


def shrunk(model: Any, folder: Path, flags: str, capsys: Any) -> tuple[Any, Any]:
    """Shrink a model by the command, which prints JSON.

    Returns:
        What it prints, and the config of what it saves.
    """
    names = [str(dense_folder(folder, model)), str(folder / "small")]
    assert main(["shrink", *names, *flags.split(), *calibration(folder), "--json"]) == 0
    config = json.loads((folder / "small" / "config.json").read_text())
    return json.loads(capsys.readouterr().out), config


def check_refused(folder: Path, cases: Iterable[tuple[list[str], str]], capsys: Any) -> None:
    """Check that `shrink` refuses flags with a message, of the model that `dense_folder` saved."""
    for flags, message in cases:
        assert main(["shrink", str(folder / "dense"), str(folder / "none"), *flags]) == 1
        assert message in capsys.readouterr().err
    assert not (folder / "none").exists()


def calibration(folder: Path, window: int = 16) -> list[str]:
    """Flags that calibrate on two windows of the text that `dense_folder` wrote."""
    return f"--calibration {folder / 'text.txt'} --num-samples 2 --window {window}".split()
