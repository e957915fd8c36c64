"""The model card: only what is known or was measured, made from the provenance and exact counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from hf_sparse.checkpoint.on_grids import bits_in_words
from hf_sparse.checkpoint.reproducing import citations, limits, reproduction
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.provenance.values import FILLED, Calibration, Metric, Provenance, Step, Value
from hf_sparse.structure.parts import full_size
from hf_sparse.structure.units import shrunk_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_sparse.checkpoint.overview import Overview

CARD_NAME = "README.md"
# A row that every card of ours has.
OUR_FACT = "zeros in the whole model"
METRICS_TITLE = "## Metrics"
NO_METRICS = "None were measured."
# Endings of class names, the Auto class that loads them, and what the Hub calls their task.
_HEADS = (
    ("ForCausalLM", "AutoModelForCausalLM", "text-generation"),
    ("LMHeadModel", "AutoModelForCausalLM", "text-generation"),
    ("ForMaskedLM", "AutoModelForMaskedLM", "fill-mask"),
    ("ForSequenceClassification", "AutoModelForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "AutoModelForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "AutoModelForQuestionAnswering", "question-answering"),
    ("ForMultipleChoice", "AutoModelForMultipleChoice", "multiple-choice"),
    ("ForImageClassification", "AutoModelForImageClassification", "image-classification"),
    ("Model", "AutoModel", "feature-extraction"),
)


@dataclass(frozen=True)
class Card:
    """What is known of a checkpoint.

    Args:
        model: the model that is saved.
        config: pattern, sparsity and format that it is saved with.
        measured: the zeros of what is saved.
        formats: the formats of the target weights, counted.
        provenance: what was done to the model; its metrics are those of what is saved.
        tags: for the Hub, beside those of the provenance.
        usage: how to load it; None: as a checkpoint of transformers.
    """

    model: PreTrainedModel
    config: SparsityConfig
    measured: Overview
    formats: Mapping[str, int]
    provenance: Provenance
    tags: Sequence[str] = ()
    usage: str | None = None

    def text(self) -> str:
        """The card in Markdown, with its metadata."""
        sections = [
            f"---\n{self._data().to_yaml()}\n---",
            f"# {'Sparse ' if self._is_sparse else ''}{self._name}",
            _markdown(("", ""), self._facts()),
            *self._filled(),
            "## What was done",
            *self._steps(),
            METRICS_TITLE,
            metrics_table(self.provenance.metrics),
            "## How to load",
            self.usage or self._usage(),
            *self._reproduction(),
            "## Limits",
            limits(
                self.provenance,
                is_sparse=self._is_sparse,
                compressed=any(name != "dense" for name in self.formats),
            ),
            *self._citations(),
        ]
        return "\n\n".join(sections) + "\n"

    def _reproduction(self) -> list[str]:
        if not self.provenance.steps:
            return []
        auto = _head_of(self._name)[0]
        storage = "" if self.config.format == "auto" else f", format={self.config.format!r}"
        saved = f"hf_sparse.save_pretrained(model, 'OUTPUT'{', config' if storage else ''})"
        saved += f"  # SparsityConfig(...{storage})" if storage else ""
        if self.usage is not None:  # no checkpoint of transformers
            saved = "hf_sparse.export_onnx(model, 'OUTPUT')"
        return ["## How to make it", reproduction(self.provenance, auto, saved)]

    def _citations(self) -> list[str]:
        found = citations(self.provenance.steps)
        return [] if found is None else ["## Papers", found]

    def _data(self) -> ModelCardData:
        card: dict[str, Any] = {
            key: value if isinstance(value, str) else list(value)
            for key, value in self.provenance.card
        }
        tags = card.pop("tags", [])
        sparse = ["sparse", *self._patterns] if self._is_sparse else []
        grid = self.config.grid
        bits = [] if grid is None else [f"int{grid.bits}"]
        tags = [
            "hf_sparse",
            *sparse,
            *bits,
            *self.tags,
            *([tags] if isinstance(tags, str) else tags),
        ]
        return ModelCardData(
            base_model=self.provenance.base_model,
            base_model_relation=self._relation,
            library_name="transformers",
            pipeline_tag=_head_of(self._name)[1],
            tags=list(dict.fromkeys(tags)),
            **card,
        )

    @property
    def _relation(self) -> str | None:
        """What the Hub calls it: it knows no pruning, and takes pruned models for fine-tuned ones."""
        if self.provenance.base_model is None or not self.provenance.steps:
            return None
        return "finetune" if self.config.grid is None else "quantized"

    @property
    def _name(self) -> str:
        return type(self.model).__name__.removeprefix("FSDP").removeprefix("Sparse")

    @property
    def _is_sparse(self) -> bool:
        return self.measured.is_sparse or self.config.sparsity > 0

    @property
    def _bits(self) -> str:
        """The grids of the weights, in words."""
        return bits_in_words(self.config)

    @property
    def _patterns(self) -> list[str]:
        """The patterns of the zeros, as they are asked for."""
        patterns = self.measured.patterns or [str(self.config.pattern)]
        return list(dict.fromkeys(map(_as_asked, patterns)))

    def _facts(self) -> list[tuple[str, str]]:
        targets = self.measured.targets
        formats = ", ".join(f"{name} ({count})" for name, count in sorted(self.formats.items()))
        return [
            ("base model", _plain(self.provenance.base_model or "not recorded")),
            *self._blocks(),
            *(self._zeros() if self._is_sparse else ()),
            *([("bits", told)] if (told := self._bits) else ()),
            ("weights in the whole model", f"{targets.parameters:,}"),
            (OUR_FACT, f"{targets.model_sparsity:.4f}"),
            ("storage of the target weights", formats or "none"),
        ]

    def _zeros(self) -> list[tuple[str, str]]:
        """The zeros of the targets; with those that other prunings made, if there are any."""
        measured, pattern = self.measured, ", ".join(self._patterns)
        if not measured.has_other_zeros:
            targets = measured.targets
            return [
                ("pattern", pattern),
                ("sparsity of the target weights", f"{targets.sparsity:.4f}"),
                ("zeros", f"{targets.zeros:,} of {targets.numel:,} target weights"),
            ]
        sparsity = measured.zeros / max(measured.numel, 1)
        return [
            ("patterns" if "," in pattern else "pattern", pattern),
            ("sparsity of the weight matrices", f"{sparsity:.4f}"),
            ("zeros", f"{measured.zeros:,} of {measured.numel:,} weights in the matrices"),
        ]

    def _filled(self) -> list[str]:
        """A sentence about zeros that are gone, until other zeros are made."""
        for step in reversed(self.provenance.steps):
            if step.method == FILLED:
                told = dict(step.options)
                return [
                    f"Zeros of this model were filled after it was pruned: sparsity "
                    f"{_shown(told.get('promised'))} was promised, {_shown(told.get('found'))} was "
                    "left when it was saved."
                ]
            if step.pattern is not None:
                break
        return []

    def _blocks(self) -> list[tuple[str, str]]:
        """What is left of a shrunk model's blocks."""
        sizes = shrunk_sizes(self.model)
        if sizes is None:
            return []
        full = full_size(self.model.config)
        heads, neurons = sum(size.heads for size in sizes), sum(size.neurons for size in sizes)
        left = (
            f"{heads:,} of {len(sizes) * full.heads:,} heads, "
            f"{neurons:,} of {len(sizes) * full.neurons:,} neurons"
        )
        return [("what is left of the blocks", left)]

    def _steps(self) -> list[str]:
        """One table for each step, under its number if there are several."""
        steps = self.provenance.steps
        if not steps:
            return ["Nothing that was recorded."]
        rows = [[(_plain(title), _plain(value)) for title, value in step_rows(s)] for s in steps]
        tables = [_markdown(("", ""), own) for own in rows]
        if len(steps) == 1:
            return tables
        titles = [f"### Step {number}" for number in range(1, len(steps) + 1)]
        return [part for pair in zip(titles, tables, strict=True) for part in pair]

    def _usage(self) -> str:
        ours = self.config.format != "dense"
        compressed = any(name != "dense" for name in self.formats)
        auto = _head_of(self._name)[0]
        package = "import hf_sparse  # pip install hf_sparse\n" if ours else ""
        code = (
            f"{package}from transformers import {auto}\n\n"
            f'model = {auto}.from_pretrained("REPO_OR_FOLDER")'
        )
        note = (
            f"The checkpoint is stored {'compressed' if compressed else 'under a class of hf_sparse'}; "
            "without hf_sparse the model does not load."
            if ours
            else "All weights are stored in place; no other package is needed."
        )
        return f"```python\n{code}\n```\n\n{note}"


def _head_of(class_name: str) -> tuple[str, str | None]:
    """The Auto class that loads models of a class, and their task on the Hub."""
    for ending, auto, task in _HEADS:
        if class_name.endswith(ending):
            return auto, task
    return "AutoModel", None


def step_rows(step: Step) -> list[tuple[str, str]]:
    """What is known of a step, a title and a text each, for a table."""
    pattern = None if step.pattern is None else _as_asked(step.pattern)
    rows: list[tuple[str, str | None]] = [("method", step.method), ("pattern", pattern)]
    if step.sparsity is not None:
        rows.append(("sparsity", f"{step.sparsity:.4g}"))
    rows += [("targets", ", ".join(step.targets or ())), ("ignored layers", ", ".join(step.ignore))]
    rows += [(f"option {name}", _shown(value)) for name, value in step.options]
    rows += [
        ("calibration", _calibration(step.calibration)),
        ("teacher", ", ".join(f"{name} {_shown(value)}" for name, value in step.distillation)),
        ("seed", None if step.seed is None else str(step.seed)),
        *((f"{metric.name}, after this step", _figures(metric)) for metric in step.metrics),
        ("made with", ", ".join(f"{name} {_shown(value)}" for name, value in step.versions)),
        ("date", step.date),
    ]
    return [(title, value) for title, value in rows if value]


def _as_asked(pattern: str) -> str:
    """A pattern as it is asked for: whole heads are completed with their size, which is a detail."""
    return "head" if pattern.startswith("head_in:") else pattern


def _shown(value: Value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _calibration(data: Calibration | None) -> str | None:
    if data is None:
        return None
    windows = f"{data.windows:,} {'window' if data.windows == 1 else 'windows'}"
    length = f" of {data.length:,} tokens" if data.length else ""
    tokens = f", {data.tokens:,} tokens in all" if data.tokens else ""
    known = f" (fingerprint {data.fingerprint})" if data.fingerprint else ""
    return f"{windows}{length}{tokens}{known}"


def _figures(metric: Metric) -> str:
    dense = "" if metric.dense is None else f" (dense {metric.dense:.4g})"
    return f"{metric.sparse:.4g}{dense}"


def metrics_table(metrics: Sequence[Metric]) -> str:
    """What a card's section of metrics says."""
    if not metrics:
        return NO_METRICS
    rows = [
        (
            _plain(metric.name),
            "not measured" if metric.dense is None else f"{metric.dense:.4g}",
            f"{metric.sparse:.4g}",
        )
        for metric in metrics
    ]
    return _markdown(("metric", "dense", "sparse"), rows)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table."""
    return re.sub(r"([\\`<>|\[\]])", r"\\\1", text)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])
