"""Optimum's classes open our exports and agree with torch: `make test-optimum`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

import hf_sparse
from hf_sparse.exporters.heads import Case, example, head_of
from tests.exporters.test_export import FAST, SLOW, headed_model

ROOT = Path(__file__).parents[2]
OPTIMUM = ROOT / ".optimum/bin/python"


@pytest.mark.optimum
@pytest.mark.parametrize(("family", "ending"), [*FAST, *SLOW])
def test_optimum_opens_the_export(family: str, ending: str, tmp_path: Path) -> None:
    # Optimum 0.1.0 takes hidden_size / heads for the size of Qwen3's heads, whatever head_dim says.
    model = headed_model(family, ending, **({"head_dim": 8} if family == "qwen3" else {}))
    head = head_of(model)
    hf_sparse.export_onnx(model, tmp_path / "graph")
    given = example(model, head, Case(2, 7)).arrays
    if head.caches:
        given = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    command = [OPTIMUM, ROOT / "tests/programs/optimum_reader.py", tmp_path / "graph"]
    inputs = json.dumps({name: value.tolist() for name, value in given.items()})
    done = subprocess.run(
        [*map(str, command), f"ORTModel{head.reader}", inputs],
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if head.caches:
        wanted = model.generate(**given, max_new_tokens=12, do_sample=False)
        assert found["ids"] == wanted.tolist()
        return
    with torch.no_grad():
        outputs = model(**given)
    assert found
    for name, value in found.items():
        torch.testing.assert_close(torch.tensor(value), outputs[name], rtol=1e-4, atol=1e-4)
