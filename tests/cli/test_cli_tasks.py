"""`hf-sparse eval --tasks`: figures of files, dense beside, and recorded in the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse.checkpoint.same_weights import hash_weights
from hf_sparse.checkpoint.save import tensors_to_store
from hf_sparse.provenance.record import provenance_of
from hf_sparse_cli import main
from tests.support.dense_folders import sparse_folders
from tests.support.tiny_models import tiny_tokenizer
from tests.zeroshot.test_zeroshot import choice_rows


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    sparse_folders(tmp_path)
    for name in ("arc_easy", "piqa"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, choice_rows(8))))
    return tmp_path


@pytest.mark.slow
def test_figures_are_printed_and_recorded(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = folders / "sparse"
    before = {file.name: file.read_bytes() for file in sparse.glob("*.safetensors")}
    command = ["eval", str(sparse), "--dense", str(folders / "dense"), "--tasks", "arc_easy,piqa"]
    command += ["--task-data", str(folders), "--limit", "6"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(sparse)
    expected = hf_sparse.evaluate_choices(
        model, tiny_tokenizer(), ["arc_easy", "piqa"], data=folders, limit=6
    )
    assert [score["acc"] for score in found["scores"]] == [s.acc for s in expected.scores]
    assert found["dense"][0]["examples"] == 6

    assert main([*command, "--record"]) == 0
    assert f"recorded in {sparse}: config.json and its card" in capsys.readouterr().out
    card = (sparse / "README.md").read_text()
    assert "None were measured" not in card
    assert "## How to load" in card
    again = AutoModelForCausalLM.from_pretrained(sparse)
    known = provenance_of(again)
    assert [metric.name for metric in known.metrics] == [m.name for m in expected.metrics]
    assert all(metric.name in card and metric.dense is not None for metric in known.metrics)
    assert known.weights == hash_weights(tensors_to_store(again))
    assert {file.name: file.read_bytes() for file in sparse.glob("*.safetensors")} == before
    hf_sparse.save_pretrained(again, folders / "again")  # the weights are the same
    assert expected.metrics[0].name in (folders / "again" / "README.md").read_text()


def test_a_card_of_somebody_else_stays(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = folders / "sparse" / "README.md"
    card.write_text("mine")
    command = ["eval", str(folders / "sparse"), "--tasks", "piqa", "--task-data", str(folders)]
    assert main([*command, "--record"]) == 0
    assert "it has no card of hf_sparse" in capsys.readouterr().out
    assert card.read_text() == "mine"
    assert "zero-shot piqa" in (folders / "sparse" / "config.json").read_text()


def test_missing_files_are_told_before_a_model_is_loaded(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    command = ["eval", str(folders / "sparse"), "--tasks", "boolq", "--task-data", str(folders)]
    assert main(command) == 1
    assert "has no boolq.jsonl for task 'boolq'; it has arc_easy.jsonl" in capsys.readouterr().err
