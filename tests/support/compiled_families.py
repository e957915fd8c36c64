"""Tiny models of the families that are compiled as a whole, with every kind of block they can have."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from hf_sparse import SparsityConfig, prune_
from tests.support.tiny_models import SIZES, VOCABULARY

_GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
_LOCAL: dict[str, Any] = {"sliding_window": 8}
_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]

# What is told to the config of each family beside its type.
ENCODERS: dict[str, dict[str, Any]] = {
    "roberta": SIZES,
    "xlm-roberta": SIZES,
    "camembert": SIZES,
    "electra": {**SIZES, "embedding_size": 16},
    "mpnet": SIZES,
    "distilbert": {
        **{k: v for k, v in SIZES.items() if not k.startswith(("hidden", "inter", "num_"))},
        "dim": 32,
        "hidden_dim": 64,
        "n_layers": 3,
        "n_heads": 4,
    },
    "vit": {
        **{k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 8,
    },
    "modernbert": {
        **SIZES,
        "local_attention": 16,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
}
DECODERS: dict[str, dict[str, Any]] = {
    "gpt_neox": {**SIZES, "hidden_size": 64},
    "phi": {**_GROUPED, "hidden_size": 64},
    "phi3": {**_GROUPED, **_LOCAL, "hidden_size": 64, "partial_rotary_factor": 0.75},
    "gemma": {**_GROUPED, "head_dim": 16},
    "gemma2": {
        **_GROUPED,
        **_LOCAL,
        "head_dim": 16,
        "layer_types": _TYPES,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 24,
    },
    "gemma3_text": {
        **_GROUPED,
        **_LOCAL,
        "head_dim": 16,
        "layer_types": _TYPES,
        "query_pre_attn_scalar": 24,
    },
    "smollm3": {
        **_GROUPED,
        **_LOCAL,
        "use_sliding_window": True,
        "layer_types": _TYPES,
        "no_rope_layers": [1, 0, 1],
    },
    "olmo2": _GROUPED,
    "granite": {
        **_GROUPED,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.22,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
    },
    "starcoder2": {**_GROUPED, **_LOCAL},
    "mixtral": {
        **_GROUPED,
        **_LOCAL,
        "intermediate_size": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        **_GROUPED,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
    },
}
FAMILIES = {**ENCODERS, **DECODERS}


def config_of(family: str, **changes: Any) -> PreTrainedConfig:
    """A tiny config of a family."""
    return CONFIG_MAPPING[family](**copy.deepcopy({**FAMILIES[family], **changes}))


def model_of(
    family: str, auto: Any = AutoModel, sparsity: float = 0.6, **changes: Any
) -> PreTrainedModel:
    """A random pruned model in eval mode, all parts of whose blocks matter."""
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config_of(family, **changes))
    model.eval()
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # transformers 5.20 leaves the cap out otherwise
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.1 * torch.randn_like(parameter)
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(noise)
    prune_(model, SparsityConfig("unstructured", sparsity), "magnitude")
    return model


def inputs_of(
    family: str, batch: int, tokens: int, left: int = 0, right: int = 0
) -> dict[str, Tensor]:
    """Random tokens, or images, with so much padding on either side of the first sequence."""
    generator = torch.Generator().manual_seed(tokens)
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 48, 48, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, :left] = 0
    mask[0, tokens - right :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def seen(values: Tensor, given: dict[str, Tensor]) -> Tensor:
    """The values of the tokens that are not padding."""
    return values[given["attention_mask"].bool()] if "attention_mask" in given else values


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The floats of a model's outputs, in order."""
    for value in output.values() if isinstance(output, dict) else output:
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors_of(value)
