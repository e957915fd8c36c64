"""The model card tells all that was done to a model, and metrics while they are true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_sparse
from hf_sparse import Metric, SparsityConfig
from hf_sparse.checkpoint.same_weights import is_stored_in
from hf_sparse.checkpoint.source import stored_in
from hf_sparse.cli import main
from hf_sparse.provenance.record import provenance_of
from tests.support.exporting import needs_export
from tests.support.sparse_models import pruned_and_loaded
from tests.support.tiny_models import (
    prose,
    tiny_batches,
    tiny_classifier,
    tiny_model,
    tiny_tokenizer,
)

MAGNITUDE = ("magnitude", {"scope": "layer"})
METRICS = [Metric("accuracy, SST-2", 0.8899, 0.8807), Metric("other, one", 1.5e-7)]


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A folder with a classifier and a card with method and metrics."""
    model = tiny_classifier()
    report = hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5), "magnitude")
    folder = tmp_path / "sparse"
    return hf_sparse.save_pretrained(
        model, folder, tokenizer=tiny_tokenizer(), report=report, metrics=METRICS
    )


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def steps_in(folder: Path) -> list[tuple[str, dict[str, str]]]:
    return [(step.method, dict(step.options)) for step in stored_in(folder).steps]


def metrics_in(folder: Path) -> list[Metric]:
    """Those of config.json, which are those of the card, too."""
    metrics = list(stored_in(folder).metrics)
    assert ("None were measured." in card(folder)) == (not metrics)
    for metric in metrics:
        assert f"| {metric.name} | " in card(folder)
    return metrics


def methods_in_card(folder: Path) -> list[str]:
    return re.findall(r"^\| method \| (.+) \|$", card(folder), flags=re.MULTILINE)


def methods_of(model: Any) -> list[str]:
    return [step.method for step in provenance_of(model).steps]


@pytest.mark.parametrize("name", ["a | b", "a\nb", ""])
def test_a_metric_that_would_break_the_table_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="one line"):
        Metric(name, 1.0)


def test_what_config_json_tells_is_read_back(sparse: Path) -> None:
    assert steps_in(sparse) == [MAGNITUDE]
    assert metrics_in(sparse) == METRICS
    loaded = AutoModelForSequenceClassification.from_pretrained(sparse)
    assert provenance_of(loaded) == stored_in(sparse)


def test_every_step_is_told_once_and_in_order(tmp_path: Path) -> None:
    model = pruned_and_loaded(tmp_path / "a", SparsityConfig("column", 0.25), "wanda")
    hf_sparse.shrink_(model)
    report = hf_sparse.prune_(model, SparsityConfig("2:4", targets=["mlp.*"]), "magnitude")
    assert methods_of(model) == ["wanda", "shrink", "magnitude"]
    hf_sparse.save_pretrained(model, tmp_path / "b", report=report)
    assert methods_in_card(tmp_path / "b") == ["wanda", "shrink", "magnitude"]
    assert "| pattern | column |\n| sparsity | 0.25 |" in card(tmp_path / "b")
    # What was done elsewhere is in the report alone.
    other = hf_sparse.SparsityReport((), "2:4", 0, "SparseAdamW", {"steps": 3})
    hf_sparse.save_pretrained(model, tmp_path / "c", report=other)
    assert methods_in_card(tmp_path / "c") == ["wanda", "shrink", "magnitude", "SparseAdamW"]
    assert "| option steps | 3 |" in card(tmp_path / "c").split("### Step 4")[1]


@pytest.mark.parametrize("format", ["auto", "dense"])
def test_recovery_keeps_the_method_of_pruning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    dense, text = tmp_path / "dense", tmp_path / "text.txt"
    tiny_model("llama").save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    text.write_text(prose()[:5000])
    folders = [str(tmp_path / name) for name in ("dense", "sparse", "recovered")]
    pruning = ("--pattern", "2:4", "--method", "magnitude", "--format", format)
    assert main(["prune", *folders[:2], *pruning]) == 0
    data = ("--data", str(text), "--num-samples", "4", "--window", "16", "--lr", "0.001")
    assert main(["recover", *folders[1:], *data]) == 0, capsys.readouterr().err
    methods = [method for method, _ in steps_in(tmp_path / "recovered")]
    assert methods == ["magnitude", "recovery by finetune"]
    assert "| option lr | 0.001 |" in card(tmp_path / "recovered")


def test_a_recovered_model_replaces_its_old_card(tmp_path: Path) -> None:
    model = tiny_model("llama")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    hf_sparse.save_pretrained(model, tmp_path, metrics=METRICS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    hf_sparse.recover_(loaded, tiny_batches("llama"))
    hf_sparse.save_pretrained(loaded, tmp_path)
    assert methods_in_card(tmp_path) == ["magnitude", "recovery by finetune"]
    assert metrics_in(tmp_path) == []  # they were another model's


@pytest.mark.parametrize("format", ["auto", "dense"])
def test_metrics_of_other_weights_do_not_stay(tmp_path: Path, format: str) -> None:
    model = tiny_model("llama")
    config = SparsityConfig("2:4", format=format)
    hf_sparse.prune_(model, config, "magnitude")
    hf_sparse.save_pretrained(model, tmp_path, config, metrics=METRICS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for variant in (None, "fp16"):
        hf_sparse.save_pretrained(loaded, tmp_path, config, variant=variant)
        assert metrics_in(tmp_path) == METRICS
    with torch.no_grad():
        loaded.model.layers[0].mlp.up_proj.weight.mul_(2)  # zeros, and so all counts, are the same
    hf_sparse.save_pretrained(loaded, tmp_path, config)
    assert metrics_in(tmp_path) == []
    assert steps_in(tmp_path) == [MAGNITUDE]


@needs_export
@pytest.mark.slow
def test_metrics_of_another_graph_do_not_stay(sparse: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(sparse)
    model.config.name_or_path = ""  # the graph's own card is all that tells metrics
    hf_sparse.export_onnx(model, tmp_path / "graph", metrics=METRICS)
    assert metrics_in(tmp_path / "graph") == METRICS
    with torch.no_grad():
        model.classifier.bias += 1
    hf_sparse.export_onnx(model, tmp_path / "graph")
    assert metrics_in(tmp_path / "graph") == []


@needs_export
@pytest.mark.slow
@pytest.mark.parametrize("format", ["auto", "dense"])
def test_an_export_takes_over_method_and_metrics(sparse: Path, tmp_path: Path, format: str) -> None:
    if format == "dense":
        model = AutoModelForSequenceClassification.from_pretrained(sparse)
        config = SparsityConfig("unstructured", 0.5, format="dense")
        sparse = hf_sparse.save_pretrained(
            model, tmp_path / "dense", config, tokenizer=tiny_tokenizer(), metrics=METRICS
        )
    assert main(["export", str(sparse), str(tmp_path / "graph")]) == 0
    assert steps_in(tmp_path / "graph") == [MAGNITUDE]
    assert metrics_in(tmp_path / "graph") == METRICS
    model: Any = AutoModelForSequenceClassification.from_pretrained(sparse)
    hf_sparse.export_onnx(model, tmp_path / "int8", quantize="dynamic")
    assert metrics_in(tmp_path / "int8") == []
    with torch.no_grad():
        model.classifier.bias += 1
    hf_sparse.export_onnx(model, tmp_path / "trained")
    assert metrics_in(tmp_path / "trained") == []
    hf_sparse.export_onnx(model, tmp_path / "trained", metrics=METRICS[:1])
    assert metrics_in(tmp_path / "trained") == METRICS[:1]


def test_stored_weights_are_compared(sparse: Path) -> None:
    weights = dict(AutoModelForSequenceClassification.from_pretrained(sparse).state_dict())
    assert is_stored_in(sparse, weights)
    name = "bert.encoder.layer.1.output.dense.weight"
    assert not is_stored_in(sparse, {**weights, name: weights[name].half()})
    assert not is_stored_in(sparse, {**weights, name: weights[name] + 1})
    assert not is_stored_in(sparse, {**weights, "another": weights[name]})
    (sparse / "model.safetensors").write_bytes(b"short")
    assert not is_stored_in(sparse, weights)
