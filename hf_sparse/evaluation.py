"""Measuring models: perplexity of language models, accuracy of classifiers.

Both measure one model. To report a sparse model, measure the dense one the same way and print it
beside: a figure alone says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils.logging import tqdm

from hf_sparse.pruning.calibration import token_windows


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
            one end-of-sequence token (as C4 is).
        window: tokens in a window.
        max_windows: use the first so many windows only.
        batch_size: windows in one forward pass; memory is mostly batch_size * window * vocabulary.

    Returns:
        `exp` of the mean negative log-likelihood over all windows.

    Raises:
        ValueError: the text is shorter than one window, or the model has no language-model head.
    """
    documents = [text] if isinstance(text, str) else text
    windows = token_windows(tokenizer, documents, window, max_windows)
    device = next(model.parameters()).device
    total = 0.0
    with _evaluating(model):
        for batch in tqdm(windows.split(batch_size), desc="Perplexity"):
            ids = batch.to(device)
            logits = getattr(model(input_ids=ids), "logits", None)
            if logits is None or logits.shape[:2] != ids.shape:
                raise ValueError(
                    f"{type(model).__name__} gives no logits over the vocabulary; wanted a causal "
                    "language model, as AutoModelForCausalLM loads."
                )
            for scores, target in zip(logits[:, :-1], ids[:, 1:], strict=True):
                total += float(nn.functional.cross_entropy(scores.float(), target))
    return math.exp(total / len(windows))


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    labels: Sequence[int],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
) -> float:
    """Share of texts that a sequence classifier labels right.

    Args:
        model: a sequence classification model.
        tokenizer: of the model.
        texts: single texts, or pairs of texts.
        labels: index of the right class for each text.
        batch_size: texts in one forward pass; texts of similar length share one.
        max_length: tokens after which a text is cut; None: the tokenizer's own limit.

    Returns:
        A fraction in `[0, 1]`.

    Raises:
        ValueError: texts and labels differ in number, or there are none.
    """
    if len(texts) != len(labels) or not texts:
        raise ValueError(
            f"found {len(texts)} texts and {len(labels)} labels; wanted as many of each, at least one."
        )
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda index: sum(map(len, texts[index])))
    right = 0
    with _evaluating(model):
        for start in tqdm(range(0, len(order), batch_size), desc="Accuracy"):
            chosen = order[start : start + batch_size]
            inputs = tokenizer(
                [texts[index] for index in chosen],
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            ).to(device)
            guesses = model(**inputs).logits.argmax(dim=-1).tolist()
            right += sum(
                guess == labels[index] for guess, index in zip(guesses, chosen, strict=True)
            )
    return right / len(labels)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
