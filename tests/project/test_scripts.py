"""Every script of benchmarks/ and examples/ tells what it does when asked for help, and stops there."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    file
    for folder in ("benchmarks", "examples")
    for file in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in file.read_text()
]
scripts = pytest.mark.parametrize(
    "script", SCRIPTS, ids=lambda file: f"{file.parent.name}/{file.name}"
)


@scripts
def test_a_script_parses_its_arguments(script: Path) -> None:
    tree = ast.parse(script.read_text())
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    # `parse` is that of examples/sparsity.py, an HfArgumentParser.
    assert called & {"argparse.ArgumentParser", "parse"}


@pytest.mark.slow
@scripts
def test_a_script_answers_help(script: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), "--help"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )
    if "ModuleNotFoundError" in done.stderr or "pip install" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert "--help" in done.stdout
