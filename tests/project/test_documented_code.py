"""The Python blocks of all pages run, on tiny models; the command lines in them are understood."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

import hf_sparse
from hf_sparse_cli import main
from hf_sparse_cli.parser import make_parser
from tests.support import documents
from tests.support.documents import PROGRAMS, Block, blocks

PYTHON = list(blocks("python"))
# Of the README, tests/project/test_readme.py runs the others.
ALONE = [
    block
    for block in PYTHON
    if block.page not in PROGRAMS and (block.page != "README" or block.number == 1)
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what pages name, calls that take tiny models, and no Hub."""
    for package in ("peft", "llvmlite", "onnx", "onnxruntime", "gguf", "transformers.exporters"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    documents.folders()
    for name, most in (
        ("calibration_batches", {"num_samples": 4, "window": 16}),
        ("labelled_batches", {"window": 32}),
        ("perplexity", {"window": 16, "max_windows": 4}),
        ("benchmark", {"tokens": 8, "repeats": 1}),
    ):
        short = documents.shortened(getattr(hf_sparse, name), **most)
        monkeypatch.setattr(hf_sparse, name, short)

    def pushed(model: Any, repo_id: str, *values: Any, **named: Any) -> None:
        # tests/hub/test_hub.py pushes to a stand-in for the Hub.
        hf_sparse.save_pretrained(model, "pushed", tokenizer=named.get("tokenizer"))

    monkeypatch.setattr(hf_sparse, "push_to_hub", pushed)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PROGRAMS)
def test_a_page_runs_from_its_first_block_to_its_last(page: str, place: Path) -> None:
    names: dict[str, Any] = {}
    code = [block for block in PYTHON if block.page == page]
    assert code
    for block in code:
        exec(compile(block.code, str(block), "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("block", ALONE, ids=str)
def test_a_block_runs(block: Block, place: Path) -> None:
    names = {**documents.given(), **documents.beside(block.code)}
    exec(compile(block.code, str(block), "exec"), names)


@pytest.mark.slow
def test_the_quickstart_runs_in_a_shell(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = [block.code for block in blocks("bash") if block.page == "quickstart"]
    lines = [line for line in "".join(code).splitlines() if line.startswith("hf-sparse")]
    small = {
        "prune": "--num-samples 4 --window 32",
        "eval": "--max-windows 4 --window 32",
        "inspect": "",
        "bench": "--tokens 8 --repeats 1",
    }
    assert [line.split()[1] for line in lines] == list(small)
    for line, flags in zip(lines, small.values(), strict=True):
        assert main([*shlex.split(line)[1:], *flags.split()]) == 0, capsys.readouterr().err
    assert "saved to smollm2-sparse" in capsys.readouterr().out


def command_lines() -> list[str]:
    """The lines of all pages that call hf-sparse, without what goes into files."""
    lines = [line for block in blocks("bash") for line in block.code.splitlines()]
    return [line.partition(" >")[0] for line in lines if line.startswith("hf-sparse")]


def test_the_command_lines_of_all_pages_are_understood() -> None:
    lines = command_lines()
    assert len(lines) > 20
    for line in lines:
        if "--completion" in line:
            assert shlex.split(line)[2] in line
            continue
        make_parser().parse_args(shlex.split(line)[1:])
