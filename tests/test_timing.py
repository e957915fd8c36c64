"""`hf_sparse.benchmark`, the `bench` command and the serving example: what they print, not how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_sparse
from hf_sparse.cli import main
from tests.support.tiny_models import tiny_model

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_benchmark_times_every_way(family: str) -> None:
    model = tiny_model(family)
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.8), "magnitude")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = hf_sparse.benchmark(model, batch=2, tokens=9, repeats=2)
    kinds = [found.forward, found.decode] if family == "llama" else [found.forward]
    for measurements in kinds:
        assert [one.name for one in measurements] == ["torch", "compiled, dense", "compiled"]
        assert all(len(one.milliseconds) == 2 and one.median > 0 for one in measurements)
    assert bool(found.decode) == (family == "llama")
    assert "over compiled" in str(found)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_benchmark_times_bits_beside_the_dense_model() -> None:
    model = tiny_model("llama")
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), "magnitude")
    found = hf_sparse.benchmark(model, tokens=9, repeats=1, bits=4)
    names = ["torch", "compiled, dense", "compiled, dense, int4", "compiled, int4"]
    assert [one.name for one in found.decode] == names


def test_models_that_are_compiled_layer_by_layer_are_timed(tmp_path: Path) -> None:
    model = tiny_model("stablelm")
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.8), "magnitude")
    found = hf_sparse.benchmark(model, tokens=9, repeats=1)
    assert [one.name for one in found.forward] == ["torch", "compiled"]
    with pytest.raises(ValueError, match="layer by layer"):
        hf_sparse.save_compiled(hf_sparse.compile(model), tmp_path)


def test_benchmark_refuses_what_it_cannot_time() -> None:
    with pytest.raises(ValueError, match="batch is 0"):
        hf_sparse.benchmark(tiny_model("bert"), batch=0)
    with pytest.raises(ValueError, match="128 positions"):
        hf_sparse.benchmark(tiny_model("bert"), tokens=129)
    with pytest.raises(ValueError, match="one stack"):
        hf_sparse.benchmark(tiny_model("t5"))


@pytest.mark.slow
def test_the_bench_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("bert")
    config = hf_sparse.SparsityConfig("block:4x1", 0.75)
    hf_sparse.prune_(model, config, "magnitude")
    hf_sparse.save_pretrained(model, tmp_path / "sparse", config)
    small = ["--tokens", "8", "--repeats", "1"]
    assert main(["bench", str(tmp_path / "sparse"), *small, "--explain"]) == 0
    printed = capsys.readouterr().out
    assert "spmm 4x1" in printed
    assert "forward: compiled, dense" in printed
    assert main(["bench", str(tmp_path / "sparse"), *small, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["forward_ms"]) == {"torch", "compiled, dense", "compiled"}
    assert main(["bench", str(tmp_path / "sparse"), *small, "--explain", "--bits", "8"]) == 0
    printed = capsys.readouterr().out
    assert "int8" in printed
    assert "forward: compiled, int8" in printed
    assert main(["bench", str(tmp_path / "sparse"), "--tokens", "0"]) == 1
    assert "tokens is 0" in capsys.readouterr().err
    assert main(["bench", str(tmp_path / "sparse"), "--threads", "0"]) == 1


@pytest.mark.slow
def test_the_example_that_serves_a_classifier() -> None:
    command = [sys.executable, ROOT / "examples/serve_classifier.py", "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["requests"] == 50
    assert set(result["last"]) == {"label", "scores"}
    assert 0 < result["p50"] <= result["p90"] <= result["p99"]
