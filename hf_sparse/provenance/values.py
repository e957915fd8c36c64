"""What was done to a model: every step in order, its base model, and what was measured of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import torch
import transformers
from torch import Tensor

from hf_sparse.arguments import check_kinds
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.tables import html_table
from hf_sparse.version import __version__

# Bounds of what is told: a longer text is cut, and of more steps the last ones stay.
LONGEST_TEXT = 300
LONGEST_LIST = 200
# What can be given for the card's metadata.
CARD_DATA = ("license", "license_name", "license_link", "language", "datasets", "tags")

# What an option can be; a float is finite.
Value = str | int | float | bool | None
Pairs = tuple[tuple[str, Value], ...]
# The method of the step that a save records when it finds fewer zeros than were promised.
FILLED = "zeros were filled"


@dataclass(frozen=True)
class Metric:
    """One measured figure of the sparse model, with the dense model's beside it.

    Args:
        name: what was measured and on what, such as "perplexity, WikiText-2 validation, 512". One line
            without "|".
        sparse: the sparse model's figure.
        dense: the dense model's figure by the same measurement; None if it was not measured.
        dataset: the benchmark's name on the Hub, such as "cais/mmlu", if it is one that the Hub shows
            results of; given together with `task`, what is pushed has the figure for it, too.
        task: the benchmark's task, as its page on the Hub calls it.
    """

    name: str
    sparse: float
    dense: float | None = None
    dataset: str | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        check_kinds(Metric, vars(self))
        for key in ("dataset", "task"):
            value = getattr(self, key)
            if value is not None and not is_line(value):
                raise ValueError(f"the metric's {key} is {value[:80]!r}; wanted one line of text.")
        if (self.dataset is None) != (self.task is None):
            raise ValueError(
                f"the metric has dataset {self.dataset!r} and task {self.task!r}; wanted both, as the "
                "benchmark's page on the Hub tells them, or neither."
            )
        if "|" in self.name or not is_line(self.name):
            raise ValueError(
                f"the metric's name is {self.name[:80]!r}; wanted one line without '|', which parts "
                f"the columns of the card's table, of at most {LONGEST_TEXT} characters. Write a comma "
                "instead."
            )

    def _repr_html_(self) -> str:
        """For notebooks: both figures."""
        dense = "not measured" if self.dense is None else f"{self.dense:.4g}"
        return html_table(("metric", "dense", "sparse"), [(self.name, dense, f"{self.sparse:.4g}")])


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


# Options of a step that its `SparsityConfig` tells.
OF_CONFIG = ("uniform", "bits", "group_size", "symmetric", "embedding_bits")


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
            options = {**options, "uniform": True} if config.uniform else options
            options = {**options, **config.grid_values()}
        return cls(
            line(method),
            pairs(options),
            **described,
            calibration=calibration,
            seed=seed,
            versions=_versions(),
            date=datetime.now(UTC).date().isoformat(),
        )

    def is_told_by(self, other: Step) -> bool:
        """Whether another step has this method and all of these options; older files have texts."""
        theirs = {name: str(value) for name, value in other.options}
        # What the config tells is in no report's options.
        mine = {name: str(value) for name, value in self.options if name not in OF_CONFIG}
        return self.method == other.method and mine.items() <= theirs.items()


@dataclass(frozen=True)
class Teaching:
    """A `Distillation` of a model, until its step is recorded.

    Attributes:
        settings: of the teacher.
        ran: whether the model has been trained with it.
        ended: whether it has been removed; then only the merge of those adapters tells of it.
        told: whether a step tells of it.
        of_adapters: it trained adapters, which change the model when they are merged.
    """

    settings: Pairs
    ran: bool = False
    told: bool = False
    of_adapters: bool = False
    ended: bool = False


@dataclass(frozen=True)
class Provenance:
    """All that is known of where a model comes from.

    Attributes:
        steps: what was done to it, in order.
        base_model: Hub name of the dense model; None: it is not known, or has none.
        metrics: measured with the weights whose hash is `weights`.
        weights: see `metrics`; None without any.
        card: what was given for the card's metadata, by the names of `CARD_DATA`.
        teaching: of the `Distillation` that is attached; not stored.
    """

    steps: tuple[Step, ...] = ()
    base_model: str | None = None
    metrics: tuple[Metric, ...] = ()
    weights: str | None = None
    card: tuple[tuple[str, str | tuple[str, ...]], ...] = ()
    teaching: Teaching | None = field(default=None, compare=False)

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

    def with_filled_zeros(self, promised: float, found: float) -> Provenance:
        """With one step that records lost zeros; metrics stay those of the weights."""
        step = Step.of(FILLED, {"promised": promised, "found": found})
        steps = self.steps[:-1] if self.steps and self.steps[-1].method == FILLED else self.steps
        return replace(self, steps=(*steps[-LONGEST_LIST + 1 :], step))

    def with_teaching_told(self, optimizer: Pairs = ()) -> Provenance:
        """With a step of training by a teacher, if there was one that no other step tells of.

        Args:
            optimizer: what is known of the one that trained.
        """
        teaching = self.teaching
        if teaching is None or not teaching.ran or teaching.told or teaching.of_adapters:
            return self
        step = replace(Step.of("distillation", dict(optimizer)), distillation=teaching.settings)
        return replace(self.after(step), teaching=replace(teaching, told=True))


def is_line(text: str) -> bool:
    """Whether this is one bounded line of printable text, and not empty."""
    return 0 < len(text) <= LONGEST_TEXT and text.isprintable()


def line(value: Any) -> str:
    """A value as one bounded line of printable text."""
    text = " ".join(str(value).split())
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"


def pairs(options: Mapping[str, Any]) -> Pairs:
    """Options by name: numbers, truth values and None as they are, all else as text."""
    named = {line(name): _plain(value) for name, value in options.items()}
    return tuple(sorted(named.items(), key=lambda pair: pair[0])[:LONGEST_LIST])


def is_number(value: Any) -> bool:
    """Whether this is a number that JSON has: finite, and a whole one of at most 64 bits."""
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is int and -(2**63) <= value < 2**63


def _plain(value: Any) -> Value:
    if value is None or type(value) is bool or is_number(value):
        plain: Value = value
        return plain
    return line(value)


def _versions() -> Pairs:
    others = (str(torch.__version__), transformers.__version__)
    return tuple(zip(("hf_sparse", "torch", "transformers"), (__version__, *others), strict=True))
