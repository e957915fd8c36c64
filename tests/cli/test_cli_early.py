"""What the command line tells before the work: names that are missing, runs that are not there."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

import hf_sparse
from hf_sparse.cli import commands, main
from hf_sparse.pruning import on_disk
from hf_sparse_cli.places import unfinished
from hf_sparse_cli.usage import check, doubts
from tests.support.tiny_models import prose, tiny_model, tiny_tokenizer


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a dense model in `models/model`, and a text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_model("llama").save_pretrained("models/model")
    tiny_tokenizer().save_pretrained("models/model")
    Path("text.txt").write_text(prose()[:4000])
    return tmp_path


def stream(*flags: str) -> int:
    data = ["--calibration", "text.txt", "--num-samples", "2", "--window", "16", "--stream"]
    return main(["prune", "models/model", "out", "--sparsity", "0.5", *data, *flags])


@pytest.mark.parametrize("source", ["./modle", "models/deep/er", "/nowhere/model", "~/none"])
def test_a_path_that_is_not_there_is_told_without_asking_the_hub(place: Path, source: str) -> None:
    options = argparse.Namespace(command="eval", model=source)
    with pytest.raises(FileNotFoundError, match=f"no such folder: {source}"):
        check(options)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("models/modle", ["the Hub is asked for it. Did you mean models/model?"]),
        ("models/zzz", ["there is no folder models/zzz, so that the Hub is asked for it."]),
        ("user/name", []),
        ("gpt2", []),
        ("models/model", []),
    ],
)
def test_a_name_that_may_be_a_path_is_told_at_once(
    place: Path, source: str, told: list[str]
) -> None:
    lines = list(doubts(argparse.Namespace(command="bench", model=source)))
    assert len(lines) == len(told)
    assert all(line.endswith(end) for line, end in zip(lines, told, strict=True))


@pytest.mark.parametrize(
    ("arguments", "never"),
    [
        (["eval", "models/model", "--dense", "NOPE", "--text", "text.txt"], "perplexity"),
        (["recover", "sparse", "out", "--teacher", "NOPE", "--data", "text.txt"], "recover_"),
    ],
)
def test_a_second_model_that_is_missing_is_told_before_the_first_is_loaded(
    place: Path,
    arguments: list[str],
    never: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model("llama")
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), "magnitude")
    hf_sparse.save_pretrained(model, "sparse", tokenizer=tiny_tokenizer())

    def called(*_, **__):
        raise AssertionError("a model was loaded, or used")

    monkeypatch.setattr(commands, "load", called)
    monkeypatch.setattr(hf_sparse, never, called)
    assert main(arguments) == 1
    assert "NOPE" in capsys.readouterr().err


def test_a_model_without_tokenizer_is_pruned_by_a_method_that_needs_no_text(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama").save_pretrained("bare")
    prune = ["prune", "bare", "out", "--sparsity", "0.5"]
    assert main([*prune, "--method", "magnitude", "--format", "dense"]) == 0
    assert "saved to out, without a tokenizer" in capsys.readouterr().out
    assert hf_sparse.inspect_checkpoint("out").report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert main([*prune, "--overwrite", "--calibration", "text.txt"]) == 1
    assert "holds no tokenizer: name one with --tokenizer" in capsys.readouterr().err


def test_inspect_tells_its_totals_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "models/model", "--tensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines))
    assert sum(line.startswith("whole model:") for line in lines) == 1
    assert sum("bytes in weight files" in line for line in lines) == 1
    assert any(line.startswith("model.layers.0.mlp.down_proj.weight ") for line in lines)


def test_a_stream_that_is_interrupted_before_its_first_block_keeps_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopping(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(on_disk.OnDisk, "finish", stopping)
        assert stream() == 130
    told = capsys.readouterr().err
    assert "interrupted. No block was finished: nothing is kept." in told
    assert not unfinished("out").exists()
    assert stream("--resume") == 0
    told = capsys.readouterr().err
    assert f"there is nothing to resume, no {unfinished('out')}" in told
