"""FAMILIES: the model types that have Sparse classes. One line each.

The key is the `model_type` of transformers, the value the prefix of its class names. All heads
that transformers has for a family come along. Pruning and measuring need no entry here; saving
compressed and loading with `AutoModel` do.
"""

from __future__ import annotations

FAMILIES = {
    "bert": "Bert",
    "albert": "Albert",
    "gpt2": "GPT2",
    "opt": "OPT",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
    "gpt_oss": "GptOss",
}


def base_type(model_type: str) -> str:
    """The family's `model_type`, of a sparse model too."""
    return model_type.removeprefix("sparse_")


def sparse_type(model_type: str) -> str:
    """The `model_type` under which a family is stored when it is compressed."""
    return f"sparse_{model_type}"
