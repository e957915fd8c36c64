"""lm-evaluation-harness itself, where it is installed: it reads our checkpoints, and agrees with us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import hf_sparse
from tests.support.processes import environment
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from tests.zeroshot.test_zeroshot import choice_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed"),
]
PAGE = Path(hf_sparse.__file__).parents[1] / "docs" / "evaluation.md"
HARNESS = {"HF_DATASETS_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def test_the_line_of_the_page_measures_a_sparse_checkpoint(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), "magnitude")
    hf_sparse.save_pretrained(model, tmp_path / "SPARSE", tokenizer=tokenizer)
    rows = choice_rows(30)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.yaml").write_text(TASK.format(name="mine", file=tmp_path / "rows.jsonl"))
    [line] = [line for line in PAGE.read_text().splitlines() if "lm_eval" in line and "-c" in line]
    program = line.split("'")[1]
    flags = line.split("'")[2].split()
    assert flags[-2:] == ["--tasks", "arc_easy,piqa"]
    flags = [*flags[:-1], "mine", "--include_path", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", program, *flags, "--output_path", str(tmp_path / "found")],
        cwd=tmp_path,
        env={**environment(), **HARNESS, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = (tmp_path / "found").rglob("results*.json")
    theirs = json.loads(file.read_text())["results"]["mine"]
    [ours] = hf_sparse.evaluate_choices(model, tokenizer, {"mine": rows}).scores
    for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
        key = f"{name},none"
        assert getattr(ours, name) == pytest.approx(theirs[key], abs=1e-9), name
