"""Small random models of many families, and a tokenizer trained on the standard library's prose."""

from __future__ import annotations

from functools import cache
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    T5Config,
)

VOCABULARY = 256
# What most families call the sizes of a model.
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}

# Every family that has Sparse classes.
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SIZES),
    "albert": AlbertConfig(**SIZES, embedding_size=16),
    "gpt2": GPT2Config(
        n_embd=32,
        n_layer=3,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    ),
    "opt": OPTConfig(
        **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
        ffn_dim=64,
        word_embed_proj_dim=32,
    ),
    "llama": LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "mistral": MistralConfig(**_GROUPED, sliding_window=8),
    "qwen2": Qwen2Config(
        **_GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=16),
}
# Families that `PARTS` does not list; the last two are compiled layer by layer.
UNKNOWN: dict[str, PreTrainedConfig] = {
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "gemma": GemmaConfig(**_GROUPED, head_dim=8),
    "stablelm": StableLmConfig(**_GROUPED, use_qkv_bias=True),
    "t5": T5Config(  # type: ignore[call-arg] # its start token is one of any config's settings
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    ),
}
ENCODERS = ("bert", "albert", "t5")


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The config of a tiny model, with changes."""
    config = {**CONFIGS, **UNKNOWN}[family]
    return type(config)(**{**config.to_dict(), **changes})


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in eval mode: with a language-model head, but for the encoders."""
    config = tiny_config(family, **changes)
    torch.manual_seed(seed)
    auto_class = AutoModel if family in ENCODERS else AutoModelForCausalLM
    model: PreTrainedModel = auto_class.from_config(config)
    with torch.no_grad():  # the usual initialisation leaves biases at zero
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.eval()
    return model


def tiny_classifier() -> BertForSequenceClassification:
    """A random classifier of three classes that tells texts apart, in eval mode."""
    torch.manual_seed(0)
    changes: dict[str, Any] = {"num_labels": 3, "initializer_range": 0.5, "num_hidden_layers": 2}
    model = BertForSequenceClassification(BertConfig(**{**SIZES, **changes}))
    model.eval()
    return model


def tiny_batches(family: str, count: int = 3, length: int = 12, padded: bool = False) -> list[Any]:
    """Batches of two random sequences for a tiny model."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        ids = torch.randint(2, VOCABULARY, (2, length), generator=generator)
        batch = {"input_ids": ids}
        if padded:
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][1, length // 2 :] = 0
        if family == "t5":
            batch["decoder_input_ids"] = ids[:, :6]
        batches.append(batch)
    return batches


@cache
def prose() -> str:
    """English prose that is there wherever Python is."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of 256 tokens, a new one each time: pipelines change its padding."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_trained(), eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


@cache
def _trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>", "<pad>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator([prose()[:50_000]], trainer)
    return tokenizer
