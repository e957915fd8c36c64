"""Figures that were measured: a model remembers them with its weights, a folder tells them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_sparse.checkpoint.card import CARD_NAME
from hf_sparse.checkpoint.card_file import with_metrics
from hf_sparse.checkpoint.same_weights import hash_weights
from hf_sparse.checkpoint.save import tensors_to_store
from hf_sparse.checkpoint.source import write_entry
from hf_sparse.files.atomic import replacing
from hf_sparse.provenance.record import provenance_of, remember_
from hf_sparse.provenance.values import LONGEST_LIST, Metric, Provenance
from hf_sparse.structure.layers import PACKED


def record_metrics_(model: Any, metrics: Sequence[Metric]) -> None:
    """Let a model remember figures, beside those that it remembers of the same weights.

    Args:
        model: a transformers model. One whose weights are on the disk, or packed by the compiler, is
            passed over: it is not saved from memory.
        metrics: of its present weights; one of a name that it knows replaces the old one.
    """
    if vars(model).get(PACKED) or any(p.device.type == "meta" for p in model.parameters()):
        return
    known, digest = provenance_of(model), hash_weights(tensors_to_store(model))
    if known.weights != digest:
        known = replace(known, metrics=(), weights=digest)
    remember_(model, known_with(known, metrics))


def known_with(known: Provenance, metrics: Sequence[Metric]) -> Provenance:
    """What is known of a model, with more figures of the weights that its others are of."""
    named = {metric.name: metric for metric in (*known.metrics, *metrics)}
    return replace(known, metrics=tuple(named.values())[-LONGEST_LIST:])


def record_in_folder(folder: Path, known: Provenance) -> bool:
    """Put figures into the config and the card of a checkpoint folder; no weights are written.

    Args:
        folder: of the checkpoint that the model was loaded from.
        known: of the model, with its figures.

    Returns:
        Whether the folder has a card of ours, which tells them now.

    Raises:
        ValueError: the folder holds no checkpoint.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json to record figures in; wanted a folder that "
            "hf_sparse.save_pretrained wrote."
        )
    card = folder / CARD_NAME
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    told = with_metrics(text, known.metrics)
    with replacing(folder) as fresh:
        shutil.copyfile(folder / "config.json", fresh / "config.json")
        write_entry(fresh, known)
        if told is not None:
            (fresh / CARD_NAME).write_text(told, encoding="utf-8")
    return told is not None
