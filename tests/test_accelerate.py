"""Pruning with several processes: the same masks as with one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = """
import sys
from accelerate import Accelerator
from safetensors.torch import save_model
import hf_sparse
from tests.tiny_models import tiny_batches, tiny_model

accelerator = Accelerator(cpu=True)
model = tiny_model("llama")
config = hf_sparse.SparsityConfig("unstructured", 0.5)
batches = tiny_batches("llama", count=5)
hf_sparse.prune_(model, config, "wanda", batches, accelerator)
name = f"{accelerator.num_processes}-{accelerator.process_index}"
save_model(model, f"{sys.argv[1]}/{name}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_choose_the_masks_of_one(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    root = Path(__file__).parent.parent
    for processes in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [sys.executable, *launch, str(script), str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=root,
            env={"PYTHONPATH": str(root), "PATH": ""},
        )
        assert done.returncode == 0, done.stderr
    one = load_file(tmp_path / "1-0.safetensors")
    first, second = (load_file(tmp_path / f"2-{rank}.safetensors") for rank in (0, 1))
    same = []
    for name, weight in one.items():
        assert torch.equal(first[name], second[name]), name
        same.append((weight == first[name]).float().mean())
    assert min(same) > 0.99
