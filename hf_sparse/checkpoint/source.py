"""Where a model comes from: taken over when it is loaded, completed and written when it is saved."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_sparse.checkpoint.legacy_card import read_metrics, read_steps
from hf_sparse.checkpoint.same_weights import (
    WeightsHash,
    hash_weights,
    hold_same_weights,
    is_stored_in,
)
from hf_sparse.provenance.entry import ENTRY, to_dict
from hf_sparse.provenance.record import (
    provenance_of,
    read_entry,
    remember_,
    with_teaching_told,
)
from hf_sparse.provenance.values import (
    CARD_DATA,
    LONGEST_LIST,
    LONGEST_TEXT,
    Metric,
    Provenance,
    Step,
    is_line,
    line,
)

# What a model's card takes over from that of the model which it was made from.
_OF_BASE = ("license", "license_name", "license_link", "language")


def remember_source_(model: nn.Module, folder: Path) -> None:
    """Let a model that was loaded from a folder know where it comes from.

    The model's config tells its steps. Where it does not, since the checkpoint is older, the card in
    the folder does.
    """
    known = provenance_of(model)
    if not known.steps and (steps := read_steps(folder)):
        remember_(model, replace(known, steps=steps))


def described(
    model: Any,
    report: Any = None,
    base: str | None = None,
    card_data: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
) -> Provenance:
    """What is known of a model that is about to be saved.

    Args:
        model: it remembers its steps.
        report: of a step that it does not remember.
        base: Hub name of the dense model; None: what is known, or what the config was loaded from.
        card_data: for the card's metadata, beside what is known; see `CARD_DATA`.
        tags: likewise, more of them.

    Raises:
        ValueError: a key or a value that the card's metadata cannot have.
    """
    known = with_teaching_told(model)
    if report is not None and report.method:
        told = Step.of(report.method, report.options)
        if not any(step.is_told_by(told) for step in known.steps):
            pattern, sparsity = (getattr(report, name, None) for name in ("pattern", "sparsity"))
            known = known.after(replace(told, pattern=pattern, sparsity=sparsity))
    if base is None:
        base = known.base_model or base_model(model.config)
    card = {
        **_of_base(model.config),
        **dict(known.card),
        **checked_card_data(card_data or {}),
    }
    if tags:
        card |= checked_card_data(
            {"tags": [*dict.fromkeys([*_texts(card.get("tags", ())), *tags])]}
        )
    return replace(known, base_model=line(base) or None, card=tuple(sorted(card.items())))


def _of_base(config: PreTrainedConfig) -> dict[str, str | tuple[str, ...]]:
    """Licence and language of the model that a config was loaded with, as its card here tells them.

    Nothing is asked of the Hub: a model of it is looked for in the cache.
    """
    name = config.name_or_path or ""
    file: Any = Path(name) / "README.md"
    if not name or (not os.path.isdir(name) and name.count("/") > 1):
        return {}
    if not os.path.isdir(name):
        file = try_to_load_from_cache(name, "README.md")
    if not isinstance(file, str | Path) or not os.path.isfile(file):
        return {}
    try:
        text = Path(file).read_text(encoding="utf-8", errors="replace")
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
        return checked_card_data({key: data[key] for key in _OF_BASE if data.get(key)})
    except Exception:  # whatever a file by hand holds
        return {}


def base_model(config: PreTrainedConfig) -> str:
    """Hub name of the dense model that a model comes from; `""` if it is not known."""
    recorded: str | None = getattr(config, "base_model", None)
    if recorded is not None:
        return recorded
    if getattr(config, "sparsity_config", None) or getattr(config, ENTRY, None):
        return ""  # it was loaded from a checkpoint of ours, whose name is no dense model's
    name = config.name_or_path or ""
    # A local folder tells nobody much.
    return "" if os.path.exists(name) or name.count("/") > 1 else name


def checked_card_data(values: Mapping[str, Any]) -> dict[str, str | tuple[str, ...]]:
    """The metadata of a card as plain texts and tuples of texts.

    Raises:
        ValueError: another key than those of `CARD_DATA`, or a value that is no text.
    """
    checked: dict[str, str | tuple[str, ...]] = {}
    if unknown := [str(key) for key in values if key not in CARD_DATA]:
        raise ValueError(
            f"card_data has the key {unknown[0]!r}; wanted some of {', '.join(CARD_DATA)}."
        )
    for key, value in values.items():
        texts = [value] if isinstance(value, str) else value
        if (
            not isinstance(texts, Sequence)
            or len(texts) > LONGEST_LIST
            or not all(isinstance(text, str) and is_line(text) for text in texts)
            or (key.startswith("license") and not isinstance(value, str))
        ):
            raise ValueError(
                f"card_data[{key!r}] is {value!r:.80}; wanted a line of text"
                f"{'' if key.startswith('license') else ', or a list of them'}, of at most "
                f"{LONGEST_TEXT} characters."
            )
        checked[key] = value if isinstance(value, str) else tuple(texts)
    return checked


def _texts(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def stored_in(folder: Path) -> Provenance:
    """What the config of a checkpoint folder tells; nothing if there is none that can be read."""
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return Provenance()
    return read_entry(values.get(ENTRY)) if isinstance(values, dict) else Provenance()


def write_entry(folder: Path, provenance: Provenance) -> None:
    """Put the provenance into the `config.json` of a folder, or take out an older one."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    values.pop(ENTRY, None)
    if provenance != Provenance():
        values[ENTRY] = to_dict(provenance)
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


class MetricsWatch:
    """Finds the metrics that are true of a checkpoint while it is written.

    The metrics that the caller gives come first. Without any, those stay that the model, or the last
    checkpoint in the folder, had with the same weights.

    Args:
        known: what is known of the model.
        given: the metrics that the caller gives.
        folder: that is to be replaced.
    """

    def __init__(self, known: Provenance, given: Sequence[Metric], folder: Path) -> None:
        self._known, self._given, self._folder = known, tuple(given), folder
        self._stored = stored_in(folder)
        self._legacy = read_metrics(folder) if self._stored == Provenance() else ()
        in_question = given or known.metrics or self._stored.metrics or self._legacy
        self._digest = WeightsHash() if in_question else None

    def add(self, name: str, weight: Tensor) -> None:
        """Look at a weight that is saved."""
        if self._digest is not None:
            self._digest.add(name, weight)

    def result(self, fresh: Path, variant: str | None) -> Provenance:
        """What is known of the model, with the metrics that are true.

        Args:
            fresh: the folder with the new weights.
            variant: of the weights. The card tells of those without one, which stay where one is saved.
        """
        digest = None if self._digest is None else self._digest.hexdigest()
        metrics = self._given
        if not metrics and variant is not None:
            metrics, digest = self._stored.metrics or self._legacy, self._stored.weights
        elif not metrics:
            metrics = _measured_with([self._known, self._stored], digest)
            if not metrics and self._legacy and hold_same_weights(self._folder, fresh):
                metrics = self._legacy
        return replace(self._known, metrics=metrics, weights=digest if metrics else None)


def _measured_with(candidates: Sequence[Provenance], digest: str | None) -> tuple[Metric, ...]:
    """The first metrics that were measured with the weights of this hash."""
    for candidate in candidates:
        if candidate.metrics and candidate.weights == digest is not None:
            return candidate.metrics
    return ()


def known_metrics(model: Any, weights: Mapping[str, Tensor]) -> tuple[Metric, ...]:
    """The metrics that are known of a model, if its weights are those that they were measured with.

    Args:
        model: if its checkpoint is older than the entry, the card in that folder tells its metrics.
        weights: the model's, without tied ones.
    """
    known = provenance_of(model)
    if known.metrics:
        return _measured_with([known], hash_weights(weights))
    source = Path(model.config.name_or_path or "")
    if not model.config.name_or_path or stored_in(source) != Provenance():
        return ()
    metrics = read_metrics(source)
    return metrics if metrics and is_stored_in(source, weights) else ()
