"""Labelled texts: for methods that need a classifier's loss, and for measuring it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def labelled_batches(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    labels: Sequence[int] | Sequence[str],
    *,
    window: int = 512,
    batch_size: int = 8,
) -> list[dict[str, Tensor]]:
    """Make `batches` for `prune_` from labelled texts, for methods that need a classifier's loss.

    Args:
        model: a sequence classification model.
        tokenizer: of the model.
        texts: single texts, or pairs of texts.
        labels: index of the class of each text, or its name in the model's `label2id`.
        window: tokens after which a text is cut.
        batch_size: texts that go through the model together, padded to the longest of them.

    Returns:
        Batches with what the tokenizer gives, such as `input_ids` `(batch_size, tokens)`, and
        `labels` `(batch_size,)`; the last one may be smaller.

    Raises:
        ValueError: texts and labels differ in number, there are none, a label is no class of the
            model, or the model is no such classifier.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{type(model).__name__} does not classify texts; wanted ...ForSequenceClassification. "
            "For other models put labels into the batches as their forward takes them."
        )
    if batch_size < 1 or window < 2:
        raise ValueError(
            f"batch_size is {batch_size} and window {window}; wanted at least 1 and 2 tokens."
        )
    indices = class_indices(model, texts, labels)
    return [
        {
            **tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=min(window, tokenizer.model_max_length),
                return_tensors="pt",
            ),
            "labels": torch.tensor(indices[start : start + batch_size]),
        }
        for start in range(0, len(texts), batch_size)
    ]


def class_indices(
    model: nn.Module, texts: Sequence[Any], labels: Sequence[int] | Sequence[str]
) -> list[int]:
    """The class of each text, as an index, from labels that are indices or names.

    Raises:
        ValueError: texts and labels differ in number, there are none, or a label is no class of the
            model.
    """
    if len(texts) != len(labels) or not texts:
        raise ValueError(
            f"found {len(texts)} texts and {len(labels)} labels; wanted as many of each, at least one."
        )
    described: Any = model.config
    names: dict[Any, int] = described.label2id
    indices: list[Any] = [names.get(x, x) if isinstance(x, str) else x for x in labels]
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(names):
            raise ValueError(
                f"label {index!r} is no class of the model; wanted 0 to {len(names) - 1}, or one of "
                f"{', '.join(names)}."
            )
    return indices
