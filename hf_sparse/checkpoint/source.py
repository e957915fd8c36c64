"""What the model card of the folder that a model was loaded from tells: its steps, its metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse.checkpoint.card import CARD_NAME, METRICS_TITLE, OUR_FACT, THEN, Metric
from hf_sparse.checkpoint.reading import StoredTensor, checkpoint_files, read_headers, read_parts
from hf_sparse.formats import FormatError, decompress
from hf_sparse.history import Step, remember_

# A row that is longer was not written by us.
_LONGEST_ROW = 500
_STEP_ROW = re.compile(rf"\| (method|{THEN}|option \S+) \| (.+) \|")
_METRIC_ROW = re.compile(r"\| (.+) \| (not measured|\S+) \| (\S+) \|")


def remember_source_(model: Any, folder: Path) -> None:
    """Let a model that was loaded from a folder know the steps that the folder's card tells."""
    remember_(model, read_steps(folder))


def read_steps(folder: Path) -> list[Step]:
    """The steps that the card in a folder tells; none if there is no card of hf_sparse."""
    steps: list[Step] = []
    tables = re.split(r"\n\s*\n", _card(folder).split(METRICS_TITLE)[0])
    [table] = [table for table in tables if f"\n| {OUR_FACT} |" in table][-1:] or [""]
    for line in table.split("\n"):
        if len(line) > _LONGEST_ROW or (row := _STEP_ROW.fullmatch(line)) is None:
            continue
        title, value = row.groups()
        if title in ("method", THEN):
            steps.append(Step(value))
        elif steps:
            option = (title.removeprefix("option "), value)
            steps[-1] = Step(steps[-1].method, (*steps[-1].options, option))
    return [step for step in steps if step.method != "not recorded"]


def read_metrics(folder: Path) -> list[Metric]:
    """The metrics that the card in a folder tells; none if there is no card of hf_sparse."""
    metrics = []
    for line in _card(folder).partition(METRICS_TITLE)[2].partition("\n## ")[0].splitlines():
        if (row := _METRIC_ROW.fullmatch(line)) is None:
            continue
        name, dense, sparse = row.groups()
        try:
            known = None if dense == "not measured" else float(dense)
            metrics.append(Metric(name, float(sparse), known))
        except ValueError:  # the table's head
            continue
    return metrics


def is_stored_in(folder: Path, weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights of a checkpoint folder can be read and are these, bit for bit.

    Args:
        folder: of the checkpoint.
        weights: of a model, without tied ones.

    Memory: one weight.
    """
    return _holds(folder, weights.keys(), lambda name: weights[name])


def hold_same_weights(folder: Path, other: Path) -> bool:
    """Whether the weights of two checkpoint folders can be read and are the same, bit for bit.

    Memory: two weights.
    """
    try:
        others = {tensor.name: tensor for tensor in read_headers(checkpoint_files(other))}
    except FormatError:
        return False
    return _holds(folder, others.keys(), lambda name: _read(others[name]))


def _holds(folder: Path, names: Set[str], weight_of: Callable[[str], Tensor]) -> bool:
    """Whether the weights of a folder have these names and values."""
    try:
        stored = read_headers(checkpoint_files(folder))
        same = {tensor.name for tensor in stored} == names
        return same and all(_is_equal(_read(each), weight_of(each.name)) for each in stored)
    except FormatError:
        return False


def _is_equal(stored: Tensor, weight: Tensor) -> bool:
    return stored.dtype == weight.dtype and torch.equal(stored, weight.detach().cpu())


def _read(stored: StoredTensor) -> Tensor:
    parts = read_parts(stored)
    return decompress(parts) if stored.compressed else parts[""]


def _card(folder: Path) -> str:
    file = folder / CARD_NAME
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return text if OUR_FACT in text else ""
