"""Threads, forks, workers and interruptions around compiled models; memory over long runs."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import hf_sparse
from hf_sparse import SparsityConfig
from tests.endurance.memory_bounds import BOUNDS, Bound, is_kept
from tests.endurance.plateaus import RUNS, grows, plateau
from tests.support.compiled_folders import in_a_child
from tests.support.processes import environment
from tests.support.tiny_models import tiny_model

IDS = torch.arange(2, 26).view(2, 12)


@pytest.fixture(scope="module")
def model() -> Any:
    plain = tiny_model("llama")
    hf_sparse.prune_(plain, SparsityConfig("2:4"), "magnitude")
    return hf_sparse.compile(plain)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_memory_does_not_grow(name: str) -> None:
    """In a process of its own, as other tests leave memory behind; `make endurance` runs it longer."""
    count = max(RUNS[name][1] // 20, 20)
    code = (
        "import sys; from tests.endurance.plateaus import plateau, grows; "
        f"sys.exit(grows(*plateau({name!r}, {count})))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), check=False)
    assert done.returncode == 0


@pytest.mark.slow
def test_growth_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    grow = (lambda room: lambda number: kept.append(torch.ones(1 << 21)), 0)
    monkeypatch.setitem(RUNS, "growing", grow)
    assert grows(*plateau("growing", 10))


def test_eight_threads_share_a_model(model: Any) -> None:
    inputs = [IDS[:, : 3 + number] for number in range(8)]
    wanted = [logits(model, ids) for ids in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = list(pool.map(lambda ids: logits(model, ids), inputs))
            assert all(map(close, found, wanted))


def test_threads_with_models_of_their_own() -> None:
    models = [
        hf_sparse.compile(tiny_model("llama", seed, num_hidden_layers=1)) for seed in range(4)
    ]
    wanted = [logits(one) for one in models]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(close, pool.map(logits, models), wanted))


def test_a_fork_computes_the_same(model: Any) -> None:
    wanted = logits(model)

    def run() -> None:
        assert close(logits(model), wanted)

    assert in_a_child(run) == 0
    assert close(logits(model), wanted)


def logits_of_files(folder: str) -> list[float]:
    found: list[float] = logits(hf_sparse.load_compiled(folder)).reshape(-1).tolist()
    return found


@pytest.mark.slow
def test_a_spawned_process_computes_the_same(model: Any, tmp_path: Path) -> None:
    wanted = logits(model)
    hf_sparse.save_compiled(model, tmp_path)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(logits_of_files, str(tmp_path)).result()
    assert close(torch.tensor(found).view_as(wanted), wanted)
    assert close(logits(model), wanted)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="wants RLIMIT_DATA")
@pytest.mark.parametrize("name", BOUNDS)
def test_memory_of_docstrings_is_enough(name: str) -> None:
    """In a process of its own, as a limit also counts what other tests left behind."""
    command = [sys.executable, "-m", "tests.endurance.memory_bounds", "--call", name]
    assert subprocess.run(command, env=environment(), check=False).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="wants RLIMIT_DATA")
def test_a_bound_that_is_too_small_is_seen() -> None:
    careless = Bound(lambda: None, lambda given, folder: torch.ones(100 << 20), 50 << 20)
    assert not is_kept(careless)
    assert is_kept(replace(careless, nbytes=450 << 20))


class Computed(Dataset[torch.Tensor]):
    """Items that a compiled model gives, in the process that asks for them."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return logits(self.model, IDS[:, : 2 + index])[0, -1]


def test_workers_of_a_data_loader_compute(model: Any) -> None:
    wanted = [Computed(model)[number] for number in range(4)]
    found = list(DataLoader(Computed(model), batch_size=None, num_workers=2))
    assert all(map(close, found, wanted))


def forever(model: Any) -> None:
    while True:
        logits(model)


def interrupt_until(caught: threading.Event, delay: float) -> None:
    """Send Ctrl-C again and again: Python swallows one that meets a finaliser."""
    time.sleep(delay)
    while not caught.wait(0.05):
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interruption_leaves_the_model_whole(model: Any) -> None:
    wanted = logits(model)
    # What a shell starts in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for delay in (0.0005, 0.002, 0.005):
            caught = threading.Event()
            threading.Thread(target=interrupt_until, args=(caught, delay)).start()
            with pytest.raises(KeyboardInterrupt):
                forever(model)
            caught.set()
            assert close(logits(model), wanted)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e30])
def test_strange_sizes_give_what_the_plain_model_gives(size: float) -> None:
    plain = tiny_model("llama", num_hidden_layers=1)
    compiled = hf_sparse.compile(plain)
    embeds = torch.full((1, 5, 32), size)
    embeds[0, :, ::3] = -size
    with torch.no_grad():
        found, wanted = (one(inputs_embeds=embeds).logits for one in (compiled, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(model: Any, size: float) -> None:
    embeds = torch.randn(2, 5, 32)
    embeds[1, 2, 3] = size
    with torch.no_grad():
        found = model(inputs_embeds=embeds).logits
    assert torch.isfinite(found[0]).all()
    assert not torch.isfinite(found[1, 2]).any()
