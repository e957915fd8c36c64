"""The memory bounds that the docstrings promise, measured in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.processes import environment, run


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_nothing_holds_a_second_model(tmp_path: Path) -> None:
    done = run("memory_of_calls", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    hidden_states, largest_matrix = 16 * 256 * 512 * 4 / 1e6, 512 * 1408 * 4 / 1e6
    assert found["model"] > 300
    # The scores of one matrix: its magnitudes, their ranks and masks, and the inputs of one block.
    assert found["wanda"] < 2 * hidden_states + 16 * largest_matrix, found
    assert found["magnitude"] < 16 * largest_matrix, found
    assert found["save"] < 2 * 20 + 16 * largest_matrix, found  # one shard
    # The files are mapped into memory: what has been read counts until the system wants it back.
    mapped = 0.55 * found["model"]
    assert found["inspect"] < mapped + 16 * largest_matrix, found
    assert found["load"] < found["model"] + mapped + 16 * largest_matrix, found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_masked_lora_needs_little_more_than_stock_lora() -> None:
    pytest.importorskip("peft")
    # So that glibc gives back what is freed, and only what is needed counts.
    variables = environment(MALLOC_MMAP_THRESHOLD_="131072")
    found = {}
    for kind in ("masked", "stock"):
        done = run("memory_of_adapters", kind, variables=variables)
        assert done.returncode == 0, done.stderr
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    masked = found["masked"]
    assert masked["model"] > 150
    # The adapters, their gradients and moments, and some matrices of one layer.
    assert masked["extra"] < 4 * masked["adapters"] + 0.2 * masked["model"]
    assert masked["extra"] < found["stock"]["extra"] + 0.1 * masked["model"]
