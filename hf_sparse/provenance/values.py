"""What was done to a model: every step in order, its base model, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import torch
import transformers
from torch import Tensor

from hf_sparse.arguments import check_kinds
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.version import __version__

# Bounds of what is told: a longer text is cut, and of more steps the last ones stay.
LONGEST_TEXT = 300
LONGEST_LIST = 200
# What can be given for the card's metadata.
CARD_DATA = ("license", "license_name", "license_link", "language", "datasets", "tags")

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Metric:
    """One measured figure of the sparse model, with the dense model's beside it.

    Args:
        name: what was measured and on what, such as "perplexity, WikiText-2 validation, 512". One line
            without "|".
        sparse: the sparse model's figure.
        dense: the dense model's figure by the same measurement; None if it was not measured.
    """

    name: str
    sparse: float
    dense: float | None = None

    def __post_init__(self) -> None:
        check_kinds(Metric, vars(self))
        if "|" in self.name or not is_line(self.name):
            raise ValueError(
                f"the metric's name is {self.name[:80]!r}; wanted one line without '|', which parts "
                f"the columns of the card's table, of at most {LONGEST_TEXT} characters. Write a comma "
                "instead."
            )


@dataclass(frozen=True)
class Calibration:
    """The data that a step looked at.

    Attributes:
        windows: number of sequences.
        length: tokens in the longest of them; None where inputs are no tokens.
        tokens: all of them, padding left out; None likewise.
        fingerprint: a hash by which the same data are known again.
    """

    windows: int
    length: int | None = None
    tokens: int | None = None
    fingerprint: str | None = None

    @classmethod
    def of(
        cls, batches: Sequence[Mapping[str, Any]], fingerprint: str | None = None
    ) -> Calibration:
        """Describe batches, as `prune_` takes them."""
        windows = tokens = length = 0
        for batch in batches:
            ids = batch.get("input_ids")
            if not isinstance(ids, Tensor):
                tensors = [value for value in batch.values() if isinstance(value, Tensor)]
                windows += len(tensors[0]) if tensors else 0
                continue
            mask = batch.get("attention_mask")
            padded = isinstance(mask, Tensor) and mask.shape == ids.shape
            windows, length = windows + len(ids), max(length, ids.shape[-1])
            tokens += int(mask.bool().sum()) if padded else ids.numel()  # type: ignore[union-attr]
        return cls(windows, length or None, tokens or None, fingerprint and fingerprint[:16])


@dataclass(frozen=True)
class Step:
    """One thing that was done to a model.

    Attributes:
        method: such as "wanda", "SparseAdamW", "shrink".
        options: of the method, by name.
        pattern, sparsity, targets, ignore: of the `SparsityConfig`; None where the step has none.
        calibration: the data that the method looked at.
        distillation: the settings of a teacher that was learned from.
        seed: of a training run.
        versions: of hf_sparse, torch and transformers.
        date: the day, in UTC.
        metrics: what was measured after this step and before the next.
    """

    method: str
    options: Pairs = ()
    pattern: str | None = None
    sparsity: float | None = None
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    calibration: Calibration | None = None
    distillation: Pairs = ()
    seed: int | None = None
    versions: Pairs = ()
    date: str | None = None
    metrics: tuple[Metric, ...] = ()

    @classmethod
    def of(
        cls,
        method: str,
        options: Mapping[str, Any],
        config: SparsityConfig | None = None,
        calibration: Calibration | None = None,
        seed: int | None = None,
    ) -> Step:
        """A step that is taken today, with the packages that are installed."""
        described: dict[str, Any] = {}
        if config is not None:
            targets = None if config.targets is None else tuple(map(line, config.targets))
            described = {
                "pattern": str(config.pattern),
                "sparsity": config.sparsity,
                "targets": targets and targets[:LONGEST_LIST],
                "ignore": tuple(map(line, config.ignore))[:LONGEST_LIST],
            }
        return cls(
            line(method),
            pairs(options),
            **described,
            calibration=calibration,
            seed=seed,
            versions=_versions(),
            date=datetime.now(UTC).date().isoformat(),
        )

    def is_same_as(self, other: Step) -> bool:
        """Whether both tell of one method with the same options."""
        return (self.method, self.options) == (other.method, other.options)


@dataclass(frozen=True)
class Provenance:
    """All that is known of where a model comes from.

    Attributes:
        steps: what was done to it, in order.
        base_model: Hub name of the dense model; None: it is not known, or has none.
        metrics: measured with the weights whose hash is `weights`.
        weights: see `metrics`; None without any.
        card: what was given for the card's metadata, by the names of `CARD_DATA`.
        teaching: settings of a `Distillation` that no step tells of yet; not stored.
    """

    steps: tuple[Step, ...] = ()
    base_model: str | None = None
    metrics: tuple[Metric, ...] = ()
    weights: str | None = None
    card: tuple[tuple[str, str | tuple[str, ...]], ...] = ()
    teaching: Pairs = field(default=(), compare=False)

    def after(self, step: Step, instead_of: Step | None = None) -> Provenance:
        """With one more step, or with the last one replaced if it is `instead_of`.

        Metrics become those of the step that they were measured after.
        """
        if instead_of is not None and self.steps and self.steps[-1] == instead_of:
            return replace(self, steps=(*self.steps[:-1], step))
        steps = self.steps[-LONGEST_LIST + 1 :]
        if steps and self.metrics:
            steps = (*steps[:-1], replace(steps[-1], metrics=self.metrics))
        return replace(self, steps=(*steps, step), metrics=(), weights=None)


def is_line(text: str) -> bool:
    """Whether this is one bounded line of printable text, and not empty."""
    return 0 < len(text) <= LONGEST_TEXT and text.isprintable()


def line(value: Any) -> str:
    """A value as one bounded line of printable text."""
    text = " ".join(str(value).split())
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"


def pairs(options: Mapping[str, Any]) -> Pairs:
    """Options by name, as text."""
    named = sorted((line(name), line(value)) for name, value in options.items())
    return tuple(named[:LONGEST_LIST])


def _versions() -> Pairs:
    others = (str(torch.__version__), transformers.__version__)
    return tuple(zip(("hf_sparse", "torch", "transformers"), (__version__, *others), strict=True))
