"""Labelled texts: for methods that need a classifier's loss, and for measuring it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.arguments import check_model
from hf_sparse.calibration.texts import check_tokenizer, check_unicode


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
        ValueError: texts and labels differ in number, there are none, one is no text, a label is no
            class of the model, or the model is no such classifier.
    """
    check_model(model, "labelled_batches")
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{type(model).__name__} does not classify texts; wanted ...ForSequenceClassification. "
            "For other models put labels into the batches as their forward takes them."
        )
    for name, value, least in (("batch_size", batch_size, 1), ("window", window, 2)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r}; wanted a whole number >= {least}.")
    check_tokenizer(tokenizer)
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
        ValueError: texts and labels differ in number, there are none, one is no text or pair of
            texts, a label is no class of the model, or the model has no classes of which one is
            right.
    """
    if isinstance(texts, str) or isinstance(labels, str):
        raise ValueError("found one text or label; wanted a list of texts and one of labels.")
    for name, given in (("texts", texts), ("labels", labels)):
        if isinstance(given, bytes | Mapping) or not hasattr(given, "__getitem__"):
            raise ValueError(
                f"{name} is a {type(given).__name__}; wanted a list. Of rows of a data set: "
                f"[row[{name[:-1]!r}] for row in rows]."
            )
    if len(texts) != len(labels) or not len(texts):
        raise ValueError(
            f"found {len(texts)} texts and {len(labels)} labels; wanted as many of each, at least one."
        )
    for text in texts:
        _check_text(text)
    described: Any = model.config
    problem = described.problem_type
    if described.num_labels < 2 or problem not in (None, "single_label_classification"):
        raise ValueError(
            f"the model has {described.num_labels} labels and problem_type {problem!r}; wanted a "
            "classifier with one right class for each text. For other models put labels into the "
            "batches as their forward takes them."
        )
    names = described.label2id or {}
    return [_class_index(label, names, described.num_labels) for label in labels]


def _class_index(label: Any, names: Mapping[str, int], classes: int) -> int:
    named: Any = names.get(label) if isinstance(label, str) else label
    try:
        index = operator.index(named)
    except TypeError:
        index = -1
    if isinstance(label, bool) or not 0 <= index < classes:
        raise ValueError(
            f"label {label!r} is no class of the model; wanted 0 to {classes - 1}, or one of "
            f"{', '.join(map(str, names))}."
        )
    return index


def _check_text(text: Any) -> None:
    """Refuse what a tokenizer does not take as a text or a pair of texts."""
    parts = (text,) if isinstance(text, str) else text
    if isinstance(text, Mapping):
        raise ValueError(
            f"found a {type(text).__name__} with the fields {', '.join(map(str, text))}; wanted a "
            'text, or a pair of texts: [row["text"] for row in rows].'
        )
    if not isinstance(parts, tuple | list) or len(parts) > 2 or not len(parts):
        raise ValueError(f"found {text!r}; wanted a text, or a pair of texts.")
    for part in parts:
        if not isinstance(part, str):
            raise ValueError(f"found {part!r}; wanted a text of whole Unicode characters.")
        check_unicode(part)
