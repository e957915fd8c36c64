"""Pruning with several processes: the same masks as with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import run
from tests.support.recipes import RECIPES, TRAINED


@pytest.mark.slow
def test_two_processes_choose_the_masks_of_one(tmp_path: Path) -> None:
    for processes in (1, 2):
        done = run("prune_in_processes", tmp_path, processes=processes)
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
