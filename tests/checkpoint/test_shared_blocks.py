"""Blocks that share their weights: how often they run is checked where no weight tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModel

import hf_sparse
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_runs_below_one_is_refused(tmp_path: Path, count: int) -> None:
    model = tiny_model("albert")
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), "magnitude")
    hf_sparse.save_pretrained(model, tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "num_hidden_layers": count}))
    with pytest.raises(hf_sparse.FormatError, match="num_hidden_layers"):
        AutoModel.from_pretrained(tmp_path)
