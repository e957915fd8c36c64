"""The model that is about to be loaded is looked at itself, unless arguments make it another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

import hf_sparse
from hf_sparse.checkpoint import described
from tests.support.tiny_models import tiny_classifier


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("auto_class", "changes", "count"),
    [
        (AutoModelForSequenceClassification, {}, 0),
        (AutoModelForSequenceClassification, {"dtype": torch.bfloat16}, 0),
        (AutoModelForSequenceClassification, {"num_labels": 7, "ignore_mismatched_sizes": True}, 1),
        (AutoModel, {}, 1),
    ],
)
def test_a_second_model_is_made_only_for_another_class_or_config(
    auto_class: Any,
    changes: dict[str, Any],
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_classifier()
    config = hf_sparse.SparsityConfig("2:4")
    hf_sparse.prune_(model, config, "magnitude")
    hf_sparse.save_pretrained(model, tmp_path, config)
    build, built = described.build, []

    def counted(*arguments: Any) -> Any:
        built.append(arguments)
        return build(*arguments)

    monkeypatch.setattr(described, "build", counted)
    loaded = auto_class.from_pretrained(tmp_path, **changes)
    assert len(built) == count
    assert hf_sparse.measure_sparsity(loaded, config).violations == 0
