"""The hf-sparse command, run as a user would."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

import hf_sparse
from hf_sparse.cli import main
from tests.support.dense_folders import dense_folder
from tests.support.tiny_models import prose, tiny_classifier, tiny_model, tiny_tokenizer


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    dense_folder(tmp_path)
    rows = [json.dumps({"text": text}) for text in prose()[:20000].split("\n\n")]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    return tmp_path / "dense"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def prune(dense: Path, output: Path, *arguments: object) -> int:
    data = ("--calibration", dense.parent / "text.jsonl", "--num-samples", 4, "--window", 32)
    return run("prune", dense, output, *data, *arguments)


def test_prune_eval_and_inspect(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(dense, tmp_path / "sparse", "--pattern", "2:4", "--tensors") == 0
    assert "model.layers.0.self_attn.q_proj.weight" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert hf_sparse.measure_sparsity(model, hf_sparse.SparsityConfig("2:4")).violations == 0

    text = ("--text", dense.parent / "text.txt", "--window", 32)
    assert run("eval", tmp_path / "sparse", "--dense", dense, *text, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    expected = hf_sparse.perplexity(model, tiny_tokenizer(), prose()[:4000], 32)
    assert figures["sparse"] == pytest.approx(expected)
    assert figures["dense"] != figures["sparse"]
    assert run("eval", tmp_path / "sparse", *text) == 0
    assert "--dense" in capsys.readouterr().out

    assert run("inspect", tmp_path / "sparse") == 0
    assert "pattern 2:4" in capsys.readouterr().out
    assert run("inspect", tmp_path / "sparse", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"]["sparsity"] == 0.5
    assert set(found["formats"].values()) == {"nm"}
    assert run("inspect", dense) == 0
    assert "a dense checkpoint" in capsys.readouterr().out


def test_prune_with_magnitude_targets_and_format(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(
        "prune",
        dense,
        tmp_path / "sparse",
        "--method",
        "magnitude",
        "--scope",
        "global",
        "--sparsity",
        0.7,
        "--targets",
        "mlp.*",
        "--ignore",
        "layers.0.*",
        "--format",
        "gap8",
        "--json",
    )
    assert code == 0
    report = json.loads(capsys.readouterr().out)
    assert report["options"] == {"scope": "global"}
    assert report["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert {tensor["name"].split(".")[2] for tensor in report["tensors"]} == {"1", "2"}
    formats = hf_sparse.inspect_checkpoint(tmp_path / "sparse").formats
    assert set(formats.values()) == {"gap8"}
    assert len(formats) == 6


def test_eval_of_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_classifier()
    hf_sparse.save_pretrained(model, tmp_path / "model", tokenizer=tiny_tokenizer())
    rows = [{"premise": word, "hypothesis": "b", "label": i % 2} for i, word in enumerate("abcdef")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labelled = ("--labels", tmp_path / "rows.jsonl", "--fields", "premise,hypothesis")
    assert run("eval", tmp_path / "model", *labelled, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    texts = [(row["premise"], row["hypothesis"]) for row in rows]
    labels = [row["label"] for row in rows]
    assert figures["metric"] == "accuracy"
    assert figures["sparse"] == hf_sparse.accuracy(model, tiny_tokenizer(), texts, labels)
    assert run("eval", tmp_path / "model", "--labels", tmp_path / "rows.jsonl") == 1
    assert "has no field 'sentence'; it has premise, hypothesis, label" in capsys.readouterr().err


def test_a_classifier_is_pruned_on_labelled_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = tiny_classifier(), tiny_tokenizer()
    model.config.label2id = {"no": 0, "perhaps": 1, "yes": 2}
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    texts = [text[:80] for text in prose()[:9000].split("\n\n")[:11]]
    labels = [("no", 1, "yes")[number % 3] for number in range(11)]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "sparse"
    common = ("prune", tmp_path / "dense", out, "--method", "taylor", "--pattern", "head")
    common += ("--overwrite",)
    labelled = ("--labels", tmp_path / "rows.jsonl", "--fields", "text")
    sizes = ("--sparsity", 0.5, "--num-samples", 10, "--batch-size", 4, "--window", 16)
    assert run(*common, *labelled, *sizes) == 0, capsys.readouterr().err
    batches = hf_sparse.labelled_batches(
        model, tokenizer, texts[:10], labels[:10], window=16, batch_size=4
    )
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0]]
    assert max(batch["input_ids"].shape[1] for batch in batches) == 16
    config = hf_sparse.SparsityConfig("head", 0.5)
    hf_sparse.prune_(model, config, "taylor", batches)
    found = AutoModelForSequenceClassification.from_pretrained(out).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value), name

    capsys.readouterr()
    assert run(*common, *sizes) == 1
    assert "or of a classifier --labels FILE" in capsys.readouterr().err
    assert run(*common, *labelled, *sizes, "--stream") == 1
    assert "do not --stream" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text(prose()[:4000])
    assert run(*common, *sizes, "--calibration", tmp_path / "text.txt") == 1
    assert "Give --labels FILE" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a", "label": "never"}))
    assert run(*common, *labelled, *sizes) == 1
    assert "label 'never' is no class of the model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="LlamaForCausalLM does not classify texts"):
        hf_sparse.labelled_batches(tiny_model("llama"), tokenizer, ["a"], [0])
    few = ("--sparsity", 0.5, "--num-samples", -1, "--window", 16)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a", "label": "yes"}))
    assert run(*common, *labelled, *few) == 1
    assert "--num-samples is -1" in capsys.readouterr().err
    assert run(*common, *labelled[:2], "--fields", "text,text,text", *sizes) == 1
    assert "wanted the name of a text, or two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("texts", "labels", "settings", "message"),
    [
        (["a"], [0], {"batch_size": 0}, "batch_size is 0"),
        (["a"], [0], {"batch_size": 1.5}, "batch_size is 1.5; wanted a whole number"),
        (["a"], [0], {"window": 3.5}, "window is 3.5; wanted a whole number"),
        ("abc", [0, 1, 2], {}, "wanted a list of texts"),
        ([None], [0], {}, "wanted a text, or a pair of texts"),
        ([("a", "b", "c")], [0], {}, "wanted a text, or a pair of texts"),
        (["\ud800"], [0], {}, "whole Unicode characters"),
        (["a"], [3], {}, "label 3 is no class of the model; wanted 0 to 2"),
        (["a"], [0.5], {}, "label 0.5 is no class"),
        (["a"], [True], {}, "label True is no class"),
    ],
)
def test_texts_and_labels_that_cannot_be_learned_from(
    texts: Any, labels: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        hf_sparse.labelled_batches(tiny_classifier(), tiny_tokenizer(), texts, labels, **settings)


def test_labels_are_any_integers_and_need_classes() -> None:
    model, tokenizer = tiny_classifier(), tiny_tokenizer()
    model.config.label2id = None
    for labels in (np.array([2, 0]), torch.tensor([2, 0])):
        (batch,) = hf_sparse.labelled_batches(model, tokenizer, ["a", "b"], labels)
        assert batch["labels"].tolist() == [2, 0]
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="one right class for each text"):
        hf_sparse.labelled_batches(model, tokenizer, ["a"], [0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pattern", "2-4"], "unknown pattern '2-4'"),
        (["--pattern", "2:4", "--sparsity", "0.7"], "fixes the sparsity at 0.5"),
        (["--sparsity", "1.5"], "sparsity is 1.5"),
        ([], "needs a sparsity"),
        (["--sparsity", "0.5", "--targets", "q_prj"], "'q_prj' matches no layer"),
        (
            ["--sparsity", "0.5", "--method", "magnitude", "--option", "scope=all"],
            "one of layer, global",
        ),
        (["--sparsity", "0.5", "--scope", "layer"], "--scope is for the methods"),
        (["--sparsity", "0.5", "--num-samples", "999"], "--num-samples is 999"),
    ],
)
def test_wrong_use_is_told_and_nothing_is_written(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list, message: str
) -> None:
    assert prune(dense, tmp_path / "out", *arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_source_is_not_overwritten(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune(dense, dense, "--pattern", "2:4") == 1
    assert "the dense model would be lost" in capsys.readouterr().err


def test_a_damaged_dense_model_is_told(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dense / "model.safetensors").write_bytes(b"short")
    assert run("eval", dense, "--text", dense.parent / "text.txt") == 1
    assert "hf-sparse: error:" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_is_not_measured(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ("--text", dense.parent / "text.txt", "--window", 32, "--json")
    assert run("eval", dense, *text) == 0
    expected = json.loads(capsys.readouterr().out)
    config = BertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bare")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"sentence": "a", "label": 0}))
    assert run("eval", tmp_path / "bare", "--labels", rows) == 1
    assert "bare holds no tokenizer: name one with --tokenizer" in capsys.readouterr().err
    (tmp_path / "bare/tokenizer_config.json").write_text("{}")
    assert run("eval", tmp_path / "bare", "--labels", rows) == 1
    assert "its files are missing" in capsys.readouterr().err
    (tmp_path / "tokenizer").mkdir()
    for file in dense.glob("tokenizer*"):
        file.rename(tmp_path / "tokenizer" / file.name)
    assert run("eval", dense, *text, "--tokenizer", tmp_path / "tokenizer") == 0
    found = json.loads(capsys.readouterr().out)
    wanted = {
        name: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
        for name, value in expected.items()
    }
    assert found == wanted


def test_missing_files_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", tmp_path) == 1
    assert "config.json" in capsys.readouterr().err
    assert run("inspect", tmp_path / "none") == 1
    nowhere = ("prune", tmp_path / "none", tmp_path / "out", "--pattern", "2:4")
    assert run(*nowhere, "--method", "magnitude") == 1
    assert capsys.readouterr().err.count("no such folder") == 2
    assert run("eval", tmp_path, "--text", tmp_path / "none.txt") == 1
    with pytest.raises(SystemExit, match="2"):
        run("eval", tmp_path)


def test_a_graph_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(Path(__file__).parents[1] / "golden/old/onnx-bert", tmp_path / "graph")
    (tmp_path / "text.txt").write_text(prose()[:1000])
    for command in (
        ["inspect", tmp_path / "graph"],
        ["export", tmp_path / "graph", tmp_path / "again"],
        ["eval", tmp_path / "graph", "--text", tmp_path / "text.txt"],
        ["prune", tmp_path / "graph", tmp_path / "again", "--pattern", "2:4", "--stream"]
        + ["--calibration", tmp_path / "text.txt"],
        ["push", tmp_path / "graph", "user/name"],
    ):
        capsys.readouterr()
        assert run(*command) == 1
        assert "holds an ONNX graph, model.onnx, and no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    # One that holds both is a checkpoint.
    tiny_model("llama").save_pretrained(tmp_path / "graph")
    assert run("inspect", tmp_path / "graph") == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a\xe2\x80\xa8b"}\n\n{"txt": "c"}', "line 3 has no field 'text'; it has txt"),
        (b'"the text"', "line 1 is no JSON object"),
        (b'{"text": null}', "line 1: text is None; wanted a text"),
        (b"{", "line 1 is no JSON"),
        (b'{"text": "\xe9"}', "is no UTF-8 text"),
    ],
)
def test_bad_lines_are_named(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "text.jsonl").write_bytes(content)
    assert prune(dense, tmp_path / "out", "--pattern", "2:4") == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["prune", "eval", "inspect", "shrink", "push", "convert"])
def test_help_is_complete(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run(command, "--help")
    text = capsys.readouterr().out
    assert "--json" in text


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("hf-sparse")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"hf_sparse {hf_sparse.__version__}"


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("compiled.json", "a compiled model, which hf_sparse.load_compiled reads"),
        ("adapter_config.json", "an adapter, which hf_sparse.load_adapter reads"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "bench"])
def test_other_folders_of_ours_are_told_apart(
    command: str, file: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).write_text("{}")
    assert run(command, tmp_path) == 1
    assert f"{tmp_path} holds {kind}" in capsys.readouterr().err
