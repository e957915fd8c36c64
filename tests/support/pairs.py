"""Tiny models of the families that have an encoder and a decoder."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM, PreTrainedModel

from hf_sparse import SparsityConfig, prune_

VOCABULARY = 128
# The two stacks have different sizes, wherever a family's config can tell them.
_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_BART: dict[str, Any] = {
    **_TOKENS,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "forced_eos_token_id": None,
    "scale_embedding": True,
}
_T5: dict[str, Any] = {
    **_TOKENS,
    "d_kv": 12,
    "d_ff": 64,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "relative_attention_max_distance": 40,
}
# What is told to the config of each family beside its type; gated is T5 1.1.
CONFIGS: dict[str, dict[str, Any]] = {
    "bart": _BART,
    "blenderbot": _BART,
    "blenderbot-small": _BART,
    "marian": {**_BART, "decoder_vocab_size": VOCABULARY, "activation_function": "swish"},
    "mbart": _BART,
    "pegasus": {**_BART, "activation_function": "relu"},
    "plbart": _BART,
    "t5": _T5,
    "mt5": {**_T5, "feed_forward_proj": "gated-gelu"},
    "umt5": {**_T5, "feed_forward_proj": "gated-gelu"},
}


def pair_of(
    family: str,
    auto: Any = AutoModelForSeq2SeqLM,
    pattern: str = "unstructured",
    sparsity: float = 0.6,
    **changes: Any,
) -> PreTrainedModel:
    """A random pruned model in eval mode, all parts of whose blocks matter.

    Args:
        family: of `CONFIGS`.
        auto: a class of transformers: an Auto class, or a model's own.
        pattern, sparsity: of its zeros.
        changes: to the config.
    """
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**copy.deepcopy({**CONFIGS[family], **changes}))
    own = not hasattr(auto, "from_config")
    model: PreTrainedModel = auto(config) if own else auto.from_config(config)
    model.eval()
    # T5's scores are not scaled, so that larger weights would make its softmax a maximum.
    factor = 1.0 if family.endswith("t5") else 3.0
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.1 * torch.randn_like(parameter)
            parameter.mul_(factor) if parameter.ndim > 1 else parameter.add_(noise)
    prune_(model, SparsityConfig(pattern, sparsity), "magnitude")
    return model


def ids_of(batch: int, tokens: int, left: int = 0, right: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens and their mask, with so much padding on either side of the first sequence."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, :left] = 0
    mask[0, tokens - right :] = 0
    return ids, mask


def inputs_of(
    batch: int, tokens: int, decoded: int, padding: str = "right", amount: int = 3
) -> dict[str, Tensor]:
    """Inputs of both stacks, with padding on one side of the first sequences."""
    told = {padding: amount}
    ids, mask = ids_of(batch, tokens, **(told if tokens > amount else {}))
    decoder_ids, decoder_mask = ids_of(batch, decoded, **(told if decoded > amount else {}))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }
