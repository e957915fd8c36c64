"""The example scripts, and the code and commands of the README, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_sparse
from hf_sparse.cli import main
from tests.support.dense_folders import dense_folder
from tests.support.exporting import WHY_NOT
from tests.support.tiny_models import prose, tiny_classifier, tiny_tokenizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs/reference.md").read_text()


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return dense_folder(tmp_path, characters=20_000)


def blocks(language: str, page: str = REFERENCE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.mark.slow
def test_prune_and_reload(dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("llvmlite")
    text = str(tmp_path / "text.txt")
    arguments = [
        "--model",
        dense,
        "--calibration",
        text,
        "--text",
        text,
        "--output",
        tmp_path / "out",
    ]
    small = ["--num-samples", 2, "--window", 32, "--max-windows", 4]
    small += ["--new-tokens", 4, "--rounds", 1]
    command = [sys.executable, ROOT / "examples/prune_and_reload.py", *arguments, *small]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"compiled for (avx512|avx2|portable|neon); seed 0$", done.stdout, re.MULTILINE
    )
    # Perplexity, sparsity, megabytes, milliseconds a token compiled; of the dense model in torch, too.
    number = r" +(\d+\.\d+)"
    (dense_row,) = re.findall(rf"^dense{number * 5}$", done.stdout, re.MULTILINE)
    sparse_rows = re.findall(
        rf"^Wanda (?:unstructured|2:4){number * 4} *$", done.stdout, re.MULTILINE
    )
    assert [row[1] for row in (dense_row, *sparse_rows)] == ["0.000", "0.500", "0.500"]
    assert all(
        float(milliseconds) > 0 for row in (dense_row, *sparse_rows) for milliseconds in row[3:]
    )
    for name in ("unstructured-sparse", "2-4-sparse"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name)
        assert hf_sparse.measure_sparsity(model).sparsity == pytest.approx(0.5, abs=1e-3)
        assert (
            "| perplexity, 4 x 32 tokens |" in (tmp_path / "out" / name / "README.md").read_text()
        )


@pytest.mark.slow
def test_prune_llm(dense: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    arguments = [dense, tmp_path / "out", "--calibration", text, "--held-out", text]
    small = ["--num-samples", 2, "--window", 32, "--max-windows", 4, "--reconstruct", 1]
    command = [
        sys.executable,
        ROOT / "examples/prune_llm.py",
        *arguments,
        *small,
        "--pattern",
        "2:4",
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "perplexity, text.txt: dense" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert hf_sparse.measure_sparsity(model).sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "own"),
    [
        ("recover_finetune.py", ["--teacher", "DENSE"]),
        ("recover_lora.py", ["--kind", "shira", "--r", "2", "--teacher", "DENSE"]),
        ("recover_lora.py", ["--r", "4"]),
        ("recover_lora.py", ["--r", "4", "--dtype", "bfloat16"]),
    ],
)
def test_recovery(script: str, own: list[str], dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(dense)
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), "magnitude")
    sparse, out, text = tmp_path / "sparse", tmp_path / "out", tmp_path / "text.txt"
    hf_sparse.save_pretrained(model, sparse, tokenizer=tiny_tokenizer())
    own = [str(dense) if argument == "DENSE" else argument for argument in own]
    small = ["--num-samples", 16, "--window", 32, "--max-windows", 4, "--accumulate", 2]
    command = [sys.executable, ROOT / "examples" / script, sparse, out, "--data", text]
    command += ["--held-out", text, *small, *own]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    zeros = hf_sparse.measure_sparsity(model).zeros
    assert f"zeros: {zeros:,} before, {zeros:,} after" in done.stdout
    found = re.search(r"pruned ([\d.]+), recovered ([\d.]+)", done.stdout)
    assert found is not None
    assert float(found[2]) < float(found[1])
    recovered = AutoModelForCausalLM.from_pretrained(out)
    assert hf_sparse.measure_sparsity(recovered).zeros == zeros


def test_the_first_code_of_the_readme(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = blocks("python", README)[0]
    for found, instead in (
        ("HuggingFaceTB/SmolLM2-135M", str(dense)),
        ("calibration.txt", str(tmp_path / "text.txt")),
        ("num_samples=128, window=512", "num_samples=4, window=32"),
    ):
        assert found in code
        code = code.replace(found, instead)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "SparseLlamaForCausalLM"
    assert hf_sparse.inspect_checkpoint(tmp_path / "smollm2-sparse").report.sparsity == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("exported", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_commands_of_the_reference(exported: bool, dense: Path, tmp_path: Path) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    short = [line for block in blocks("bash", README) for line in block.splitlines()]
    assert {line for line in short if line.startswith("hf-sparse")} <= set(lines)
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("hf-sparse")]
    names = [command[0] for command in commands]
    tried = ["prune", "prune", "prune", "recover", "eval", "eval", "inspect", "report"]
    tried += ["bench", "bench", "bench"]
    tried += ["prune", "shrink", "shrink", "slim", "prune", "quantize", "export"]
    row = {"context": "a b", "choices": ["c", "d"], "label": 0}
    for name in ("arc_easy", "piqa"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    assert names == [*tried, "push", "convert"]
    outputs = ["SMALLER", "SHALLOWER", "SLIMMER", "GRAPH", "RECOVERED", "recipe.json"]
    instead = {
        "MODEL": str(dense),
        "OUTPUT": str(tmp_path / "sparse"),
        **{f"OUTPUT-{number}": str(tmp_path / f"sparse-{number}") for number in (2, 3, 4, 5, 8)},
        **{name: str(tmp_path / name.lower()) for name in outputs},
        "FOLDER": str(tmp_path),
        "text.jsonl": str(tmp_path / "text.txt"),
        "held_out.txt": str(tmp_path / "text.txt"),
        "report.html": str(tmp_path / "report.html"),
    }
    windows = ["--num-samples", "2", "--window", "32"]
    small = {"prune": windows, "recover": windows, "eval": ["--window", "32"]}
    for command in commands[: len(tried)]:
        if command[0] == "export" and (WHY_NOT or not exported):
            continue  # which takes long
        if command[0] == "report" and importlib.util.find_spec("matplotlib") is None:
            continue  # the extra plots is not installed
        arguments = [instead.get(argument, argument) for argument in command]
        if "--effort" in command:  # which wants all the text
            assert main([*arguments, "--window", "32"]) == 0
            continue
        fewer = small.get(command[0], windows if "--calibration" in command else [])
        assert main([*arguments, *fewer]) == 0


def test_the_smaller_model_of_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = [block for block in blocks("python") if "hf_sparse.shrink_(" in block]
    monkeypatch.chdir(tmp_path)
    model = tiny_classifier()
    data = {"texts": prose()[:4000].split("\n\n")[:4], "labels": [0, 2, 1, 0]}
    exec(code, {"hf_sparse": hf_sparse, "model": model, "tokenizer": tiny_tokenizer(), **data})
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "smaller")
    assert loaded.num_parameters() == model.num_parameters() < tiny_classifier().num_parameters()


def test_the_links_of_the_pages_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert "docs/format.md" in links
    for folder, page in ((ROOT, README), (ROOT / "docs", REFERENCE)):
        for link in re.findall(r"\]\(([^)]+)\)", page):
            file = folder / link.partition("#")[0]
            assert link.startswith("https://") or file.exists(), link


def test_the_reference_tells_every_method_format_and_family() -> None:
    from hf_sparse.formats import FORMATS
    from hf_sparse.pruning.methods import METHODS
    from hf_sparse.structure.parts import PARTS

    for name in (*METHODS, *FORMATS, *PARTS):
        assert f"`{name}`" in REFERENCE
    for name in hf_sparse._PUBLIC:
        if name[0].islower():
            assert f"`{name}" in REFERENCE or f"hf_sparse.{name}" in REFERENCE, name
