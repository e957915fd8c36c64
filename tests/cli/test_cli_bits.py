"""The flags of few bits, and `hf-sparse quantize`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hf_sparse import SparsityConfig
from hf_sparse.cli import main
from hf_sparse.structure.grids import check_grid
from tests.support.dense_folders import calibration, dense_folder


@pytest.fixture
def dense(tmp_path: Path) -> str:
    return str(dense_folder(tmp_path, characters=8000))


@pytest.mark.slow
def test_prune_takes_bits(dense: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    grid = ["--bits", "4", "--group-size", "32", "--asymmetric", "--embedding-bits", "8"]
    arguments = ["prune", dense, out, "--pattern", "2:4", "--method", "magnitude", *grid]
    assert main([*arguments, *calibration(tmp_path, 32)]) == 0
    assert "22 weights were rounded to int4" in capsys.readouterr().out
    config = SparsityConfig("2:4", bits=4, group_size=32, symmetric=False, embedding_bits=8)
    check_grid(AutoModelForCausalLM.from_pretrained(out), config)


@pytest.mark.slow
@pytest.mark.parametrize("data", [True, False])
def test_quantize_saves_what_it_rounded(
    data: bool, dense: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    more = calibration(tmp_path, 32) if data else []
    assert main(["quantize", dense, out, "--bits", "8", "--json", *more]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["method"], len(told["tensors"])) == ("gptq" if data else "nearest", 21)
    config = SparsityConfig("unstructured", 0.0, bits=8)
    check_grid(AutoModelForCausalLM.from_pretrained(out), config)


def test_a_budget_of_bytes_leaves_layers_out(
    dense: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    grid = ["--bits", "4", "--group-size", "32", "--embedding-bits", "8", "--ignore", "*.up_proj"]
    more = ["--bit-budget", "0.3x", *calibration(tmp_path, 32)]
    assert main(["quantize", dense, out, *grid, *more]) == 0
    told = capsys.readouterr().out
    assert "layers stay as they are, by ignore" in told
    loaded = AutoModelForCausalLM.from_pretrained(out)
    config = SparsityConfig.from_dict(loaded.config.sparsity_config)
    assert config.ignore[0] == "*.up_proj"
    assert len(config.ignore) > 1
    assert config.embedding_bits == 8
    check_grid(loaded, config)
    with pytest.raises(ValueError, match="grid"):
        check_grid(loaded, replace(config, ignore=None))
    assert (
        main(["quantize", dense, str(tmp_path / "none"), *grid, *more[:1], "0.1", *more[2:]]) == 1
    )
    assert "budget 0.100 cannot be kept" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize"], "no bits are given"),
        (["quantize", "--group-size", "32"], "no bits are given"),
        (["quantize", "--bits", "5"], "invalid choice"),
        (["quantize", "--bits", "8", "--method", "gptq"], "needs calibration text"),
        (["quantize", "--bits", "4", "--bit-budget", "2x"], "--bit-budget 2x: wanted a share"),
        (["quantize", "--bits", "4", "--bit-budget", "all"], "--bit-budget all: wanted a share"),
        (["quantize", "--bits", "4", "--bit-budget", "0.3"], "--bit-budget measures each layer"),
        (["quantize", "--embedding-bits", "8", "--bit-budget", "0.3"], "add --bits 4"),
        (["quantize", "--bits", "8", "--group-size", "128"], "128 does not divide the 32 inputs"),
        (["prune", "--sparsity", "0.5", "--group-size", "32"], "--group-size tells of a grid"),
        (["prune", "--sparsity", "0.5", "--asymmetric"], "--asymmetric tells of a grid"),
    ],
)
def test_wrong_usage_is_told_and_nothing_written(
    arguments: list[str],
    message: str,
    dense: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command, *flags = arguments
    if command == "prune":
        flags += ["--method", "magnitude"]
    try:
        code = main([command, dense, str(out), *flags])
    except SystemExit as stopped:
        code = stopped.code
    assert code
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_the_card_of_a_rounded_pruning_has_one_step_and_its_code_runs(
    dense: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["prune", dense, str(out), "--pattern", "2:4", "--bits", "4", "--group-size", "32"]
    assert main([*arguments, "--method", "wanda", *calibration(tmp_path, 32)]) == 0
    card = (out / "README.md").read_text()
    assert "Step 2" not in card
    assert "SparsityConfig('2:4', bits=4, group_size=32)" in card
    assert "hf_sparse.prune_(model, config, 'wanda', batches" in card
    assert "bits" not in card.partition("hf_sparse.prune_(")[2].partition(")")[0]


@pytest.mark.slow
def test_the_card_of_a_quantised_model_calls_quantize(dense: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ignored = ["--ignore", "up_proj"]
    assert (
        main(["quantize", dense, str(out), "--bits", "8", "--embedding-bits", "8", *ignored]) == 0
    )
    card = (out / "README.md").read_text()
    assert "hf_sparse.quantize_(model, bits=8, embedding_bits=8, method='nearest')" in card
    loaded = AutoModelForCausalLM.from_pretrained(out)
    config = SparsityConfig("unstructured", 0.0, bits=8, embedding_bits=8, ignore="up_proj")
    check_grid(loaded, config)


def test_an_effort_takes_no_bits(dense: str, tmp_path: Path, capsys) -> None:
    arguments = ["prune", dense, str(tmp_path / "out"), "--pattern", "2:4", "--effort", "seconds"]
    assert main([*arguments, "--bits", "4", "--calibration", str(tmp_path / "text.txt")]) == 1
    assert "--bits: --effort chooses for weights of full precision" in capsys.readouterr().err
