"""Every script of benchmarks/ and examples/ tells what it does when asked for help, and stops there."""

from __future__ import annotations

import ast
import builtins
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    file
    for folder in ("benchmarks", "examples")
    for file in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in file.read_text()
]
# Their flags are the fields of transformers' TrainingArguments, which need torch.
SLOW = [ROOT / "examples" / f"run_{task}.py" for task in ("clm", "glue", "multiple_choice", "qa")]
QUICK = [script for script in SCRIPTS if script not in SLOW]
# What may be imported before the arguments are parsed; the last two have flags that scripts share.
LIGHT = {*sys.stdlib_module_names, "hf_sparse_cli", "language_models", "cells"}


def name(script: Path) -> str:
    return f"{script.parent.name}/{script.name}"


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_a_script_parses_its_arguments(script: Path) -> None:
    tree = ast.parse(script.read_text())
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    # `sparsity.parse` is that of examples/sparsity.py, an HfArgumentParser.
    assert called & {"argparse.ArgumentParser", "sparsity.parse"}


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--no-such-flag", 2)])
@pytest.mark.parametrize("script", QUICK, ids=name)
def test_help_and_wrong_usage_need_no_slow_import(
    script: Path, argument: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    original = builtins.__import__

    def light_import(
        module: str, place: Any = None, names: Any = None, wanted: Any = (), level: int = 0
    ) -> Any:
        if not level and module.partition(".")[0] not in LIGHT:
            raise ImportError(f"{module} is imported before the arguments are parsed")
        return original(module, place, names, wanted, level)

    monkeypatch.setattr(sys, "argv", [str(script), argument])
    monkeypatch.syspath_prepend(script.parent)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", light_import)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == code
    told = capsys.readouterr()
    usage = told.err if code else told.out
    assert usage.startswith(f"usage: {script.name}")
    assert code or "--help" in usage


@pytest.mark.slow
@pytest.mark.parametrize("script", SLOW, ids=name)
def test_a_training_script_answers_help(script: Path) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("sklearn")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), "--help"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert "--help" in done.stdout
