"""A tokenizer in the metadata of a GGUF file: byte-level BPE, whose words llama.cpp cuts as it does."""

from __future__ import annotations

import json
from typing import Any

# How text is cut before merges, as tokenizers describes it, and what llama.cpp calls that.
_DIGITS = {"type": "Digits", "individual_digits": True}
_NORMAL, _USER, _CONTROL, _UNUSED = 1, 4, 3, 5
_WORDS = "gpt-2"


def described_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What `write_tokenizer` writes.

    Raises:
        ValueError: a tokenizer of another kind, which llama.cpp would cut text by in another way.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}; wanted a fast one of transformers."
        )
    values = json.loads(backend.to_str())
    model, cut = values["model"], _cut_of(values)
    if model["type"] != "BPE" or cut is None or model.get("byte_fallback"):
        kind = (values.get("pre_tokenizer") or {}).get("type")
        raise ValueError(
            f"the tokenizer is of type {model['type']} with the pre-tokenizer {kind}; GGUF files are "
            "written for byte-level BPE as GPT-2 and SmolLM2 have it. Leave tokenizer out, and take "
            "the vocabulary from a GGUF file of the same family."
        )
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    return {
        "pre": cut,
        "vocabulary": {index: token for token, index in model["vocab"].items()},
        "added": {token["id"]: token for token in values.get("added_tokens") or ()},
        "merges": merges,
        "prefix": bool(_byte_level(values).get("add_prefix_space")),
    }


def write_tokenizer(writer: Any, tokenizer: Any, described: dict[str, Any], size: int) -> None:
    """Write a tokenizer into the metadata.

    Args:
        writer: a `gguf.GGUFWriter`.
        tokenizer: of transformers.
        described: by `described_tokenizer`.
        size: rows of the model's embeddings; those without a token are told as unused.
    """
    tokens, kinds = [], []
    for index in range(size):
        added = described["added"].get(index)
        text = added["content"] if added else described["vocabulary"].get(index)
        tokens.append(f"[PAD{index}]" if text is None else text)
        kind = _UNUSED if text is None else _NORMAL
        if added:
            kind = _CONTROL if added["special"] else _USER
        kinds.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(described["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(described["merges"])
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(_begins_with_bos(tokenizer))
    writer.add_add_space_prefix(described["prefix"])
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)


def _begins_with_bos(tokenizer: Any) -> bool:
    first = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def _byte_level(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of the byte-level pre-tokenizer; empty if there is none."""
    found = values.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found])
    return next((part for part in parts if part.get("type") == "ByteLevel"), {})


def _cut_of(values: dict[str, Any]) -> str | None:
    """What llama.cpp calls the way in which text is cut into words; None: it is another one."""
    found = values.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found])
    byte_level = _byte_level(values)
    if values.get("normalizer") is not None or not byte_level.get("use_regex", True):
        return None
    others = [part for part in parts if part is not byte_level]
    if not byte_level:
        return None
    return {0: _WORDS, 1: "smollm" if others == [_DIGITS] else None}.get(len(others))
