"""Batches of another kind than a model takes: told in the words of who gave them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.calibration.calling import run_on
from tests.support.any_models import build, classes_of, tiny_config
from tests.support.unchanged import unchanged

IDS = torch.arange(4, 28).reshape(2, 12)
PIXELS = torch.zeros(2, 3, 32, 32)
HALF = SparsityConfig("unstructured", 0.5)
CASES = [
    ("t5", {"input_ids": IDS}, "wants the decoder's tokens, too: labels, or decoder_input_ids"),
    ("whisper", {"input_ids": IDS}, "it has no input input_ids; it wants input_features"),
    ("whisper", {"input_features": torch.zeros(2, 16, 40)}, "to be of length 256, but found 40"),
    ("clip", {"input_ids": IDS}, "Its forward takes input_ids, pixel_values"),
    ("clip", {"pixel_values": PIXELS}, "it wants input_ids"),
    ("vit", {"input_ids": IDS}, "it wants pixel_values"),
    ("vit", {"pixel_values": PIXELS[:, :1]}, "Expected 3 but got 1"),
    ("wav2vec2", {"input_ids": IDS}, "missing 1 required positional argument: 'input_values'"),
    ("bert", {"tokens": IDS}, "it has no input tokens; it wants input_ids"),
]


def model_of(model_type: str) -> Any:
    config = tiny_config(model_type)
    return build(config, classes_of(config)[0])


@pytest.mark.parametrize(("model_type", "batch", "told"), CASES)
def test_a_batch_of_another_kind_is_told(
    model_type: str, batch: dict[str, Tensor], told: str
) -> None:
    model = model_of(model_type)
    with (
        unchanged(model),
        pytest.raises(ValueError, match="does not run on a batch with") as raised,
    ):
        hf_sparse.prune_(model, HALF, "wanda", [batch])
    assert told in str(raised.value)
    assert raised.value.__cause__ is not None  # what the model said stays to be seen


def test_errors_of_hf_sparse_go_through() -> None:
    def look(module: Any, args: Any) -> None:
        hf_sparse.SparsityConfig("2:4", 0.3)  # raises

    model = model_of("bert")
    model.register_forward_pre_hook(look)
    with pytest.raises(ValueError, match="2:4") as raised:
        run_on(model, {"input_ids": IDS})
    assert "does not run" not in str(raised.value)
