"""The model card: only what is known or was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.report import SparsityReport

CARD_NAME = "README.md"


@dataclass(frozen=True)
class Metric:
    """One measured figure of the sparse model, with the dense model's beside it.

    Args:
        name: what was measured and on what, such as "perplexity, WikiText-2 validation, 512".
        sparse: the sparse model's figure.
        dense: the dense model's figure by the same measurement; None if it was not measured.
    """

    name: str
    sparse: float
    dense: float | None = None


def write_card(
    file: Path,
    model: PreTrainedModel,
    config: SparsityConfig,
    report: SparsityReport,
    metrics: Sequence[Metric],
    tags: Sequence[str] = (),
) -> None:
    """Write the model card of a checkpoint.

    Args:
        file: the card's path.
        model: the model that is saved.
        config: pattern, sparsity and format that it is saved with.
        report: the exact counts, and how the zeros were made if `prune_` made them.
        metrics: figures to print; none are invented.
        tags: for the Hub, beside the card's own.
    """
    base = base_model(model.config)
    data = ModelCardData(
        base_model=base or None,
        library_name="transformers",
        tags=["sparse", "hf_sparse", str(config.pattern), *tags],
    )
    compressed = config.format != "dense"
    usage = _usage(type(model).__name__, compressed)
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# Sparse {type(model).__name__.removeprefix('Sparse')}",
        _description(base, config, report),
        "## Metrics\n\n" + _metrics(metrics),
        "## How to load\n\n" + usage,
    ]
    ModelCard("\n\n".join(sections) + "\n").save(file)


def base_model(config: PreTrainedConfig) -> str:
    """Hub name of the dense model that a model comes from; `""` if it is not known."""
    recorded: str | None = getattr(config, "base_model", None)
    if recorded is not None:
        return recorded
    name = config.name_or_path or ""
    # A local folder tells nobody much.
    return "" if Path(name).exists() or name.count("/") > 1 else name


def needs_card(file: Path, config: SparsityConfig, report: SparsityReport) -> bool:
    """Whether there is no card, or one of ours that tells other facts than `report` counts."""
    if not file.exists():
        return True
    text = file.read_text(encoding="utf-8", errors="replace")
    facts = _markdown(("", ""), _facts(config, report)).splitlines()[2:]
    return "| zeros in the whole model |" in text and not all(fact in text for fact in facts)


def _facts(config: SparsityConfig, report: SparsityReport) -> list[tuple[str, str]]:
    return [
        ("pattern", str(config.pattern)),
        ("sparsity of the target weights", f"{report.sparsity:.4f}"),
        ("zeros", f"{report.zeros:,} of {report.numel:,} target weights"),
        ("weights in the whole model", f"{report.parameters:,}"),
        ("zeros in the whole model", f"{report.model_sparsity:.4f}"),
        ("storage format", config.format),
    ]


def _description(base: str, config: SparsityConfig, report: SparsityReport) -> str:
    rows = [
        ("base model", base or "not recorded"),
        ("method", report.method or "not recorded"),
        *((f"option {name}", str(value)) for name, value in sorted(report.options.items())),
        *_facts(config, report),
    ]
    return _markdown(("", ""), rows)


def _metrics(metrics: Sequence[Metric]) -> str:
    if not metrics:
        return "None were measured."
    rows = [
        (
            metric.name,
            "not measured" if metric.dense is None else f"{metric.dense:.4g}",
            f"{metric.sparse:.4g}",
        )
        for metric in metrics
    ]
    return _markdown(("metric", "dense", "sparse"), rows)


def _usage(class_name: str, compressed: bool) -> str:
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
    package = "import hf_sparse  # pip install hf_sparse\n" if compressed else ""
    code = (
        f"{package}from transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained("REPO_OR_FOLDER")'
    )
    note = (
        "The weights are stored compressed; without hf_sparse the model does not load."
        if compressed
        else "The zeros are stored in place; no other package is needed."
    )
    return f"```python\n{code}\n```\n\n{note}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])
