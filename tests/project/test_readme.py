"""The README is short, its tour runs, its chooser names what there is, its figures are results."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, TrainingArguments

import hf_sparse
from tests.support.tiny_models import tiny_batches, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def section(title: str) -> str:
    """The text below a heading of the second level."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_it_has_at_most_150_lines() -> None:
    assert len(README.splitlines()) <= 150


def test_the_trainer_of_the_tour_reaches_its_sparsity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = [code for code in CODE if "trainer.train()" in code]
    monkeypatch.chdir(tmp_path)
    args = TrainingArguments(
        "out", per_device_train_batch_size=1, num_train_epochs=8, report_to="none", use_cpu=True
    )
    rows = [row for batch in tiny_batches("llama") for row in batch["input_ids"]]
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    given = {"hf_sparse": hf_sparse, "model": tiny_model("llama"), "args": args, "dataset": dataset}
    exec(code, given)
    loaded = AutoModelForCausalLM.from_pretrained("my-model-sparse")
    assert hf_sparse.measure_sparsity(loaded).sparsity == pytest.approx(0.8, abs=1e-3)


@pytest.mark.slow
def test_recovery_compiling_and_exporting_of_the_tour_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("peft", "llvmlite", "onnx", "onnxruntime", "transformers.exporters"):
        pytest.importorskip(package)
    (code,) = [code for code in CODE if "recover_(" in code]
    monkeypatch.chdir(tmp_path)
    pushed: list[str] = []
    # tests/hub/test_hub.py pushes to a stand-in for the Hub.
    monkeypatch.setattr(
        hf_sparse, "push_to_hub", lambda model, name, tokenizer: pushed.append(name), raising=False
    )
    dense = tiny_model("llama")
    model = copy.deepcopy(dense)
    zeros = hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), "magnitude").zeros
    given: dict[str, Any] = {
        "hf_sparse": hf_sparse,
        "model": model,
        "dense_model": dense,
        "batches": tiny_batches("llama"),
        "tokenizer": tiny_tokenizer(),
    }
    exec(code, given)
    assert hf_sparse.measure_sparsity(model).zeros == zeros
    assert "target" in capsys.readouterr().out
    assert (tmp_path / "graph/model.onnx").exists()
    assert pushed == ["user/name-sparse"]


def test_the_chooser_names_calls_that_there_are() -> None:
    names = set(re.findall(r"`([A-Za-z_]+)\(?", section("Which part is for me?")))
    calls = {name for name in names if f"`{name}(" in README or f", `{name}`" in README}
    assert {"prune_", "save_pretrained", "compile", "shrink_", "push_to_hub"} <= calls
    for name in calls:
        assert name in hf_sparse.__all__, name


def test_measured_figures_are_those_of_the_results() -> None:
    results = (ROOT / "docs/results.md").read_text()
    rows = [line for line in section("Measured").splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 6
    for row in rows:
        for figure in re.findall(r"\d+\.\d+", row.split("|", 2)[2]):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}", results), f"{figure} of {row}"
