"""Models of four blocks that differ in what they do, and models that calls for plain ones refuse."""

from __future__ import annotations

from typing import Any

import peft
import torch
from transformers import PreTrainedModel

from hf_sparse.structure.depth import Depth
from tests.support.tiny_models import tiny_model


def deep_model(family: str = "llama", least: int = 1, **changes: Any) -> PreTrainedModel:
    """A tiny model of four blocks; its matrices are multiplied by `least`, or by 2 or 4 more."""
    model = tiny_model(family, **{"num_hidden_layers": 4, **changes})
    with torch.no_grad():
        for number, block in enumerate(Depth.of(model).blocks):
            for parameter in block.parameters():
                parameter.mul_(least + 2 * (number % 3)) if parameter.ndim > 1 else None
    return model


@torch.no_grad()
def loss_of(model: Any, batches: list[Any]) -> float:
    """The mean over the batches, labels being the tokens themselves."""
    losses = [model(**batch, labels=batch["input_ids"]).loss for batch in batches]
    return float(torch.stack(losses).mean())


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    """With adapters in it."""
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    return model


def quantized(model: Any) -> Any:
    """That says it is quantized."""
    model.hf_quantizer = type("Quantizer", (), {"quantization_config": None})()
    return model
