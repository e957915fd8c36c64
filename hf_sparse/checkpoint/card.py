"""The model card: only what is known or was measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.history import Step, steps_of
from hf_sparse.models.parts import full_size
from hf_sparse.report import SparsityReport
from hf_sparse.units import shrunk_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CARD_NAME = "README.md"
# A row that every card of ours has.
OUR_FACT = "zeros in the whole model"
# What the rows of a second step are called, where those of the first say "method".
THEN = "then"
METRICS_TITLE = "## Metrics"
_NO_METRICS = "None were measured."


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
        if "|" in self.name or len(self.name.splitlines()) != 1:
            raise ValueError(
                f"the metric's name is {self.name[:80]!r}; wanted one line without '|', which parts "
                "the columns of the card's table. Write a comma instead."
            )


@dataclass(frozen=True)
class Card:
    """What is known of a checkpoint.

    Args:
        model: the model that is saved; the steps that it remembers are told.
        config: pattern, sparsity and format that it is saved with.
        measured: the exact counts of what is saved.
        formats: the formats of the target weights, counted.
        report: how the zeros were made, if the model does not remember it.
        metrics: figures to print; none are invented.
        tags: for the Hub, beside the card's own.
        base: Hub name of the dense model; None: what the model's config tells.
        usage: how to load it; None: as a checkpoint of transformers.
    """

    model: PreTrainedModel
    config: SparsityConfig
    measured: SparsityReport
    formats: Mapping[str, int]
    report: SparsityReport | None = None
    metrics: Sequence[Metric] = ()
    tags: Sequence[str] = ()
    base: str | None = None
    usage: str | None = None

    def write(self, file: Path, old: Path, same_weights: Callable[[], bool]) -> None:
        """Write the card to `file`, unless the one at `old` is to stay.

        A card of somebody else stays, with a warning; one of ours stays
        while its facts are true and nothing is given that it does not know. Metrics in it that were
        measured with other weights are taken out.

        Args:
            file: of the new card.
            old: the one that is there, if there is one.
            same_weights: tells whether the weights that `old` is about are those that are saved;
                asked if metrics would stay.
        """
        news = self.report is not None or bool(self.metrics or self.tags or self.base)
        text = old.read_text(encoding="utf-8", errors="replace") if old.exists() else None
        if text is not None and OUR_FACT not in text:
            warnings.warn(
                f"{old} is no card of hf_sparse and stays, so that no model card is written. To have "
                "one, move it away and save again.",
                stacklevel=5,
            )
            return
        known = [self._how_to_load(), *_rows([*self._steps(), *self._facts()])]
        if text is None or news or not all(part in text for part in known):
            ModelCard(self._text()).save(file)
        elif _NO_METRICS not in text and not same_weights():
            file.write_text(_without_metrics(text), encoding="utf-8")

    def _text(self) -> str:
        base = base_model(self.model.config) if self.base is None else self.base
        sparse = ["sparse", str(self.config.pattern)] if self.config.sparsity else []
        data = ModelCardData(
            base_model=base or None,
            library_name="transformers",
            tags=["hf_sparse", *sparse, *self.tags],
        )
        how = [("base model", base or "not recorded")]
        how += self._steps() or [("method", "not recorded")]
        sections = [
            f"---\n{data.to_yaml()}\n---",
            f"# {'Sparse ' if self.config.sparsity else ''}{self._name}",
            _markdown(("", ""), [*how, *self._facts()]),
            f"{METRICS_TITLE}\n\n" + _metrics(self.metrics),
            "## How to load\n\n" + self._how_to_load(),
        ]
        return "\n\n".join(sections) + "\n"

    def _how_to_load(self) -> str:
        ours = self.config.format != "dense"
        compressed = any(name != "dense" for name in self.formats)
        return self.usage or _usage(self._name, ours, compressed)

    def _steps(self) -> list[tuple[str, str]]:
        """What was done to the model: what it remembers, and what the report tells."""
        steps = list(steps_of(self.model))
        if self.report is not None and self.report.method:
            told = Step.of(self.report.method, self.report.options)
            steps += [] if told in steps else [told]
        rows = []
        for number, step in enumerate(steps):
            rows.append((THEN if number else "method", step.method))
            rows += [(f"option {name}", value) for name, value in step.options]
        return rows

    @property
    def _name(self) -> str:
        return type(self.model).__name__.removeprefix("Sparse")

    def _facts(self) -> list[tuple[str, str]]:
        measured = self.measured
        formats = ", ".join(f"{name} ({count})" for name, count in sorted(self.formats.items()))
        return [
            *self._blocks(),
            ("pattern", str(self.config.pattern)),
            ("sparsity of the target weights", f"{measured.sparsity:.4f}"),
            ("zeros", f"{measured.zeros:,} of {measured.numel:,} target weights"),
            ("weights in the whole model", f"{measured.parameters:,}"),
            (OUR_FACT, f"{measured.model_sparsity:.4f}"),
            ("storage of the target weights", formats or "none"),
        ]

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


def base_model(config: PreTrainedConfig) -> str:
    """Hub name of the dense model that a model comes from; `""` if it is not known."""
    recorded: str | None = getattr(config, "base_model", None)
    if recorded is not None:
        return recorded
    name = config.name_or_path or ""
    # A local folder tells nobody much.
    return "" if Path(name).exists() or name.count("/") > 1 else name


def _metrics(metrics: Sequence[Metric]) -> str:
    if not metrics:
        return _NO_METRICS
    rows = [
        (
            metric.name,
            "not measured" if metric.dense is None else f"{metric.dense:.4g}",
            f"{metric.sparse:.4g}",
        )
        for metric in metrics
    ]
    return _markdown(("metric", "dense", "sparse"), rows)


def _without_metrics(text: str) -> str:
    """A card with nothing in its section of metrics."""
    before, title, rest = text.partition(METRICS_TITLE)
    _, next_title, after = rest.partition("\n## ")
    return f"{before}{title}\n\n{_NO_METRICS}\n{next_title}{after}" if title else text


def _usage(class_name: str, ours: bool, compressed: bool) -> str:
    auto = "AutoModel"
    heads = {
        "ForCausalLM": "ForCausalLM",
        "LMHeadModel": "ForCausalLM",
        "ForMaskedLM": "ForMaskedLM",
        "ForSequenceClassification": "ForSequenceClassification",
        "ForTokenClassification": "ForTokenClassification",
        "ForQuestionAnswering": "ForQuestionAnswering",
        "ForMultipleChoice": "ForMultipleChoice",
    }
    for ending, head in heads.items():
        if class_name.endswith(ending):
            auto = f"AutoModel{head}"
    package = "import hf_sparse  # pip install hf_sparse\n" if ours else ""
    code = (
        f"{package}from transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained("REPO_OR_FOLDER")'
    )
    note = (
        f"The checkpoint is stored {'compressed' if compressed else 'under a class of hf_sparse'}; "
        "without hf_sparse the model does not load."
        if ours
        else "The zeros are stored in place; no other package is needed."
    )
    return f"```python\n{code}\n```\n\n{note}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([*_rows([head]), "|---" * len(head) + "|", *_rows(rows)])


def _rows(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]
