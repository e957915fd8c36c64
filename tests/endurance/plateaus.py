"""Memory over long runs: `python -m tests.endurance.plateaus [--share 0.1] [--run NAME]`.

    inferences   10,000 calls of a compiled model, of changing shapes
    compiles      1,000 models compiled and freed
    loads         1,000 checkpoints loaded and freed
    prunings         50 prunings of a model

The first fifth of a run warms up: caches fill, and the allocator finds its size. Then the largest
memory of the last fifth is compared with that of the second one; it may be 3 % and 8 MB more. `--share`
runs fewer.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, logging

import hf_sparse
from hf_sparse import SparsityConfig
from tests.support.tiny_models import tiny_batches, tiny_model

_MB = 1 << 20
_MORE, _MORE_BYTES = 1.03, 8 * _MB
Step = Callable[[int], object]


def _sparse_model() -> Any:
    model = tiny_model("llama")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    return model


def _inferences(room: Path) -> Step:
    model = hf_sparse.compile(_sparse_model())
    chance = torch.Generator().manual_seed(0)

    def step(number: int) -> None:
        batch, tokens = (int(torch.randint(1, most, (), generator=chance)) for most in (5, 60))
        ids = torch.randint(2, 256, (batch, tokens), generator=chance)
        with torch.no_grad():
            found = model(input_ids=ids, use_cache=number % 2 == 0)
            if number % 2 == 0:
                model(input_ids=ids[:, :1], past_key_values=found.past_key_values)

    return step


def _compiles(room: Path) -> Step:
    model = _sparse_model()
    ids = torch.arange(8).view(1, 8)

    def step(number: int) -> None:
        with torch.no_grad():
            hf_sparse.compile(model)(input_ids=ids)

    return step


def _loads(room: Path) -> Step:
    hf_sparse.save_pretrained(_sparse_model(), room / "model", SparsityConfig("2:4"))
    return lambda number: AutoModelForCausalLM.from_pretrained(room / "model")


def _prunings(room: Path) -> Step:
    batches = tiny_batches("llama", length=48)

    def step(number: int) -> None:
        hf_sparse.prune_(tiny_model("llama"), SparsityConfig("2:4"), "wanda", batches)

    return step


RUNS: dict[str, tuple[Callable[[Path], Step], int]] = {
    "inferences": (_inferences, 10_000),
    "compiles": (_compiles, 1_000),
    "loads": (_loads, 1_000),
    "prunings": (_prunings, 50),
}


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def plateau(name: str, count: int) -> tuple[int, int]:
    """Run something many times; the largest memory in the second and in the last fifth, in bytes."""
    make, _ = RUNS[name]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as room, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = make(Path(room))
        most = [0] * 5
        for number in range(count):
            step(number)
            gc.collect()
            fifth = 5 * number // count
            most[fifth] = max(most[fifth], resident())
    return most[1], most[4]


def grows(early: int, late: int) -> bool:
    """Whether the memory of a run is more in the end than noise explains."""
    return late > early * _MORE + _MORE_BYTES


def main() -> int:
    """Run; the exit status is 1 if memory grows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the runs' lengths")
    parser.add_argument("--run", action="append", choices=list(RUNS))
    asked = parser.parse_args()
    growing = 0
    for name in asked.run or RUNS:
        count = max(int(RUNS[name][1] * asked.share), 10)
        early, late = plateau(name, count)
        growing += grows(early, late)
        told = "GROWS" if grows(early, late) else "flat"
        print(
            f"{name:12} {count:7,} times: {early / _MB:.1f} MB, then {late / _MB:.1f} MB: {told}",
            flush=True,
        )
    return int(growing > 0)


if __name__ == "__main__":
    sys.exit(main())
