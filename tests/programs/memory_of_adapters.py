"""Print the memory that training an adapter takes, as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparse
from tests.support.peak_memory import extra
from tests.support.tiny_models import SIZES

torch.set_num_threads(1)


def train(layers: int, adapt: Callable[..., Any]) -> dict[str, float]:
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(**SIZES | sizes | heads)
    torch.set_default_dtype(torch.bfloat16)  # at once: what is freed would hide what is needed
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    for block in model.model.layers:
        for parameter in block.parameters():
            parameter.data[..., ::2] *= parameter.ndim == 1
    found = {"model": model.get_memory_footprint() / 1e6}

    def steps() -> None:
        model_with = adapt(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        trained = [p for p in model_with.parameters() if p.requires_grad]
        found["adapters"] = sum(p.numel() for p in trained) * 4 / 1e6
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        for _ in range(2):
            ids = torch.arange(16)[None]
            model_with(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    found["extra"] = extra(steps)
    return found


adapt: Callable[..., Any] = (
    hf_sparse.get_peft_model if sys.argv[1] == "masked" else peft.get_peft_model
)
train(1, adapt)
print(json.dumps(train(24, adapt)))
