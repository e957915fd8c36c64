"""Examples and benchmarks tell in a sentence what is wrong, without a traceback."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Packages of the extras in setup.cfg, by the names that are imported.
OPTIONAL = {"datasets", "matplotlib", "onnx", "onnxruntime", "peft", "scipy", "sklearn"}
# Runs peers in environments of their own, and tells of each that is missing.
_ELSEWHERE = {"peer_worker.py"}
SCRIPTS = [
    script
    for folder in ("examples", "benchmarks")
    for script in sorted((ROOT / folder).glob("*.py"))
    if script.name not in _ELSEWHERE
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_missing_package_is_told_with_how_to_install_it(script: Path) -> None:
    tree = ast.parse(script.read_text())
    told = {
        imported
        for node in ast.walk(tree)
        if isinstance(node, ast.Try) and "pip install" in ast.unparse(node.handlers)
        for line in node.body
        for imported in ast.walk(line)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if OPTIONAL & {name.partition(".")[0] for name in names}:
            assert node in told, f"{script.name}:{node.lineno}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sparsity", "0.5", "--distil", "-1"], "--distil is -1.0; wanted a number >= 0"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ([], "needs a sparsity"),
                (["--sparsity", "0.5"], "wanted --dataset_name, or --train_file and --validation"),
            )
        ),
    ],
)
def test_wrong_arguments_of_an_example_are_told_in_a_sentence(
    arguments: list[str], told: str, tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    start = ["--model_name_or_path", "none", "--output_dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "run_clm.py"), *start, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "run_clm.py: error: " in done.stderr
    assert told in done.stderr
    assert "SparsityConfig" not in done.stderr
