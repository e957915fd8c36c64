"""What a layer does to a model's output is measured where there are tokens, and not on padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from hf_sparse import SparsityConfig
from hf_sparse.calibration import sensitivity
from hf_sparse.structure.layers import target_layers
from tests.support.tiny_models import CONFIGS, tiny_batches, tiny_model


def sensitivities(model: Any, batches: list[Any]) -> dict[str, float]:
    layers = target_layers(model, SparsityConfig("unstructured", 0.5))
    scores = {layer.name: layer.weight.float().abs() for layer in layers}
    return sensitivity.sensitivities(model, layers, scores, batches)


def padded(batches: list[Any], count: int, side: str) -> list[Any]:
    """The batches with so many tokens of padding."""
    found = []
    for batch in batches:
        ids = batch["input_ids"]
        padding, gone = torch.full_like(ids[:, :1], 1).expand(-1, count), ids.new_zeros(2, count)
        parts = [(ids, torch.ones_like(ids)), (padding, gone)]
        both = parts if side == "right" else parts[::-1]
        found.append(
            {
                "input_ids": torch.cat([part for part, _ in both], dim=1),
                "attention_mask": torch.cat([mask for _, mask in both], dim=1),
            }
        )
    return found


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["bert", "llama", "question answering"])
def test_padding_changes_no_sensitivity(kind: str) -> None:
    if kind == "question answering":
        torch.manual_seed(0)
        model = AutoModelForQuestionAnswering.from_config(CONFIGS["bert"]).eval()
    else:
        model = tiny_model(kind)
    batches = tiny_batches("bert", count=2)
    plain, with_padding = (
        sensitivities(model, given) for given in (batches, padded(batches, 20, "right"))
    )
    assert plain.keys() == with_padding.keys()
    for name, value in plain.items():
        assert with_padding[name] == pytest.approx(value, rel=0.05)


def test_outputs_of_whole_sequences_count_as_a_whole() -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS["bert"]).eval()
    batches = padded(tiny_batches("bert", count=1), 5, "right")
    [output] = sensitivity._outputs(model, batches)
    assert output.shape == (2, 2)
