"""Measuring models: perplexity of language models, accuracy of classifiers.

Both measure one model. To report a sparse model, measure the dense one the same way and print it
beside: a figure alone says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from hf_sparse.arguments import check_has_values, check_kinds, check_model
from hf_sparse.calibration.labels import class_indices
from hf_sparse.calibration.linalg import FastProducts
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.texts import check_tokenizer
from hf_sparse.calibration.windows import token_windows


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str | Iterable[str],
    window: int = 512,
    *,
    max_windows: int | None = None,
    batch_size: int = 1,
) -> float:
    """Perplexity of a causal language model on a text.

    The text is tokenised once, without special tokens, and cut into windows without overlap; the
    tail is dropped. In each window every token but the first is predicted from those before it.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        text: one text (join lines with "\\n\\n", as WikiText is), or documents, which are joined by
            one end-of-sequence token (as C4 is); blank ones are left out.
        window: tokens in a window.
        max_windows: use the first so many windows only.
        batch_size: windows in one forward pass; memory is mostly batch_size * window * vocabulary.

    Returns:
        `exp` of the mean negative log-likelihood over all windows; infinity if that overflows.

    Raises:
        ValueError: the text is shorter than one window, the window longer than the model can take,
            or the model is no causal language model, or gives NaN.
    """
    check_model(model, "perplexity")
    check_has_values(model, "perplexity", offloaded=True)
    check_kinds(perplexity, locals())
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; wanted 1 or more.")
    windows = token_windows(tokenizer, text, window, max_windows)
    device = input_device(model)
    total = 0.0
    with switched(model, training=False):
        check_causal(model, windows[:1].to(device))
        for batch in tqdm(windows.split(batch_size), desc="Perplexity"):
            ids = batch.to(device)
            for scores, target in zip(logits_of(model, ids)[:, :-1], ids[:, 1:], strict=True):
                total += float(nn.functional.cross_entropy(scores.float(), target))
    if math.isnan(total):
        raise ValueError(
            f"{type(model).__name__} gives outputs that are not finite. Load it in float32 or "
            "bfloat16; a damaged or float16 model does this."
        )
    mean = total / len(windows)
    return math.exp(mean) if mean < 700 else math.inf


def input_device(model: nn.Module) -> torch.device:
    """Where inputs go; Accelerate moves those of a model that is on the disk."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits over the vocabulary `(batch, tokens, vocabulary)` for ids `(batch, tokens)`."""
    try:
        with FastProducts():
            logits: Tensor | None = getattr(model(input_ids=ids), "logits", None)
    except (IndexError, RuntimeError) as error:
        limit = getattr(model.config, "max_position_embeddings", None)
        if isinstance(error, RuntimeError) and (limit is None or ids.shape[1] <= limit):
            raise
        raise ValueError(
            f"{type(model).__name__} cannot take {ids.shape[1]} tokens with ids up to {ids.max()}. "
            "Take a window of at most its max_position_embeddings, and its own tokenizer."
        ) from error
    if logits is None or logits.shape[:2] != ids.shape:
        raise ValueError(
            f"{type(model).__name__} gives no logits over the vocabulary; wanted a causal language "
            "model, as AutoModelForCausalLM loads."
        )
    return logits


def check_causal(model: nn.Module, ids: Tensor) -> None:
    """Refuse a model whose output for a token depends on later ones: it sees what it predicts."""
    ids = ids[:, :16]
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] - 1).abs()  # another id of the vocabulary
    before, after = logits_of(model, ids)[:, :-1], logits_of(model, changed)[:, :-1]
    if (before - after).abs().max() > 1e-4 * before.abs().max():
        raise ValueError(
            f"{type(model).__name__} sees the tokens that it is to predict; wanted a causal language "
            "model, as AutoModelForCausalLM loads."
        )


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    labels: Sequence[int] | Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
) -> float:
    """Share of texts that a sequence classifier labels right.

    Args:
        model: a sequence classification model.
        tokenizer: of the model.
        texts: single texts, or pairs of texts.
        labels: index of the right class for each text, or its name in the model's `label2id`.
        batch_size: texts in one forward pass; texts of similar length share one.
        max_length: tokens after which a text is cut; None: the tokenizer's own limit.

    Returns:
        A fraction in `[0, 1]`.

    Raises:
        ValueError: texts and labels differ in number, there are none, or a label is no class of the
            model.
    """
    check_model(model, "accuracy")
    check_has_values(model, "accuracy", offloaded=True)
    check_kinds(accuracy, locals())
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; wanted 1 or more.")
    check_tokenizer(tokenizer)
    indices = class_indices(model, texts, labels)
    device = input_device(model)
    order = sorted(range(len(texts)), key=lambda index: sum(map(len, texts[index])))
    right = 0
    with switched(model, training=False):
        for start in tqdm(range(0, len(order), batch_size), desc="Accuracy"):
            chosen = order[start : start + batch_size]
            inputs = tokenizer(
                [texts[index] for index in chosen],
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            ).to(device)
            logits = getattr(model(**inputs), "logits", None)
            if logits is None or logits.ndim != 2:
                raise ValueError(
                    f"{type(model).__name__} gives no scores per class; wanted a sequence classifier, "
                    "as AutoModelForSequenceClassification loads."
                )
            guesses = logits.argmax(dim=-1).tolist()
            right += sum(
                guess == indices[index] for guess, index in zip(guesses, chosen, strict=True)
            )
    return right / len(labels)
