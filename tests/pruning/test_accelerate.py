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
from tests.pruning.test_accelerate import RECIPES
from tests.support.tiny_models import tiny_batches, tiny_model

accelerator = Accelerator(cpu=True)
for number, (pattern, sparsity, options) in enumerate(RECIPES):
    model = tiny_model("llama")
    config = hf_sparse.SparsityConfig(pattern, sparsity)
    batches = tiny_batches("llama", count=5)
    report = hf_sparse.prune_(model, config, batches=batches, accelerator=accelerator, **options)
    assert report.sparsity == 0.5 or abs(report.sparsity - 0.5) < 1e-3, report.sparsity
    name = f"{number}-of-{accelerator.num_processes}-{accelerator.process_index}"
    save_model(model, f"{sys.argv[1]}/{name}.safetensors")
"""
RECIPES = [
    ("unstructured", 0.5, {"method": "wanda"}),
    ("unstructured", 0.5, {"method": "sparsegpt", "allocation": "owl"}),
    ("2:4", None, {"method": "alps", "refine": "swaps"}),
    ("2:4", None, {"method": "prox_local"}),
    ("unstructured", 0.5, {"method": "sparsellm", "rounds": 1}),
    ("unstructured", 0.5, {"method": "wanda", "reconstruct": 1}),
    ("2:4", None, {"method": "proxsparse", "accumulate": 1}),
]
# Two processes see the batches in other orders when they train.
TRAINED = ("reconstruct", "accumulate")


@pytest.mark.slow
def test_two_processes_choose_the_masks_of_one(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    root = Path(__file__).parents[2]
    for processes in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [sys.executable, *launch, str(script), str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=root,
            env={"PYTHONPATH": str(root), "PATH": ""},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    for number, (_, _, options) in enumerate(RECIPES):
        one = load_file(tmp_path / f"{number}-of-1-0.safetensors")
        first, second = (
            load_file(tmp_path / f"{number}-of-2-{rank}.safetensors") for rank in (0, 1)
        )
        equal, total = 0, 0
        for name, weight in one.items():
            assert torch.equal(first[name], second[name]), (options, name)
            equal += int(((weight == 0) == (first[name] == 0)).sum())
            total += weight.numel()
        assert equal / total > (0.95 if options.keys() & set(TRAINED) else 0.999), options
