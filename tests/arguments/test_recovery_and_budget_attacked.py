"""What recovery and allocation cannot work with is told before a weight is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_sparse
from tests.support.tiny_models import tiny_batches, tiny_model
from tests.support.unchanged import unchanged

IDS = torch.full((1, 8), 3)
LABELS: list[tuple[Any, str]] = [
    (torch.full((1, 8), 5000), "labels are from 5000 to 5000, but the model has 256 tokens"),
    (torch.full((1, 8), -5), "labels are from -5 to -5"),
    (torch.ones(1, 8), r"labels are torch.float32 of shape \(1, 8\); wanted torch.int64"),
    (IDS[:, :5], r"labels are torch.int64 of shape \(1, 5\); wanted torch.int64 of shape \(1, 8\)"),
    ([[1] * 8], "labels are a list"),
    (torch.full((1, 8), -100), "a batch has no token to predict"),
]


def pruned() -> Any:
    model = tiny_model("llama")
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), "magnitude")
    return model


@pytest.mark.parametrize(("labels", "wanted"), LABELS)
def test_labels_that_are_no_tokens_are_refused_before_training(labels: Any, wanted: str) -> None:
    model = pruned()
    good = {"input_ids": IDS, "labels": IDS}
    with unchanged(model), pytest.raises(ValueError, match=wanted):
        hf_sparse.recover_(model, [good, {"input_ids": IDS, "labels": labels}])


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"logits": -1.0}, "logits is -1.0; wanted"),
        ({"logits": 2.0}, "logits is 2.0; wanted"),
        ({"seed": -1}, "seed is -1; wanted"),
        ({"seed": 2**70}, "seed is .*; wanted"),
        ({"r": 10**9, "method": "lora"}, "rank 1000000000 is more than"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        hf_sparse.recover_(pruned(), tiny_batches("llama"), **options)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"patterns": []}, "patterns is empty"),
        ({"levels": []}, "levels is empty"),
        ({"patterns": ["2:5", "block:5x1"]}, "none of the patterns 2:5, block:5x1 divides a layer"),
    ],
)
def test_an_allocation_without_a_choice_is_refused(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        hf_sparse.allocate(tiny_model("bert"), "0.9x", **options)
