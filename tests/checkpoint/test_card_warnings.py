"""Warnings about model cards name the line of the caller who saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hf_sparse
from tests.support.tiny_models import tiny_model

SAVES = {
    "hf_sparse.save_pretrained": lambda model, folder: hf_sparse.save_pretrained(model, folder),
    "the model's save_pretrained": lambda model, folder: model.save_pretrained(folder),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES.keys())
def test_a_foreign_card_is_warned_of_in_the_line_that_saves(save: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), "magnitude")
    hf_sparse.save_pretrained(model, tmp_path / "first")
    sparse = hf_sparse.SparseLlamaForCausalLM.from_pretrained(tmp_path / "first")
    card = tmp_path / "second" / "README.md"
    card.parent.mkdir()
    card.write_text("# Mine")
    with pytest.warns(UserWarning, match="is no card of hf_sparse and stays") as warned:
        save(sparse, card.parent)
    assert [warning.filename for warning in warned] == [__file__]
    assert card.read_text() == "# Mine"
