"""What is asked for where batches have no labels: what gives those of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import hf_sparse
from hf_sparse import SparsityConfig
from tests.support.any_models import build, tiny_config
from tests.support.unchanged import unchanged

SIX = SparsityConfig("unstructured", 0.6)


def made(model_type: str, auto_class: Any) -> Any:
    config = tiny_config(model_type)
    model = build(config, auto_class._model_mapping[type(config)])
    hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5), "magnitude")
    return model


@pytest.mark.parametrize(
    ("model_type", "auto_class", "wanted", "unwanted"),
    [
        ("t5", AutoModelForSeq2SeqLM, r"text_target=.*input_ids", "labelled_batches"),
        ("bart", AutoModelForSeq2SeqLM, r"text_target=.*input_ids", "labelled_batches"),
        ("roberta", AutoModelForMaskedLM, r"as the model's forward takes them", "labelled_batches"),
        ("roberta", AutoModelForSequenceClassification, "labelled_batches", "text_target"),
    ],
)
def test_the_message_names_what_gives_the_labels(
    model_type: str, auto_class: Any, wanted: str, unwanted: str
) -> None:
    model = made(model_type, auto_class)
    batches = [{"input_ids": torch.arange(4, 12)[None]}]
    for call in (
        lambda: hf_sparse.recover_(model, batches),
        lambda: hf_sparse.prune_(model, SIX, "taylor", batches),
    ):
        with unchanged(model), pytest.raises(ValueError, match=wanted) as found:
            call()
        assert unwanted not in str(found.value)


def test_labels_as_told_are_learned_from() -> None:
    model = made("bart", AutoModelForSeq2SeqLM)
    ids = torch.arange(4, 12)[None]
    report = hf_sparse.recover_(model, [{"input_ids": ids, "labels": ids + 1}])
    assert report.sparsity >= 0.5
