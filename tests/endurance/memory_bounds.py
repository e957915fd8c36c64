"""The bounds that docstrings tell, kept by the system: `python -m tests.endurance.memory_bounds`.

Each call runs in a process of its own, in which no more memory can be taken than what it had before,
what its docstring tells, and 48 MB for threads and libraries (`RLIMIT_DATA`: files that are mapped
for reading and writing count, too). The model is several times as large: a copy of it would not fit.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, logging

import hf_sparse
from hf_sparse import SparsityConfig

_MB = 1 << 20
_MORE = 48 * _MB
_WIDTH, _BLOCKS = 768, 8
CONFIG = SparsityConfig("2:4")


def dense_model() -> Any:
    """Llama of some 190 MB, whose largest weight has 4.7 MB."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=_BLOCKS,
        num_attention_heads=12,
        num_key_value_heads=12,
    )
    return LlamaForCausalLM(config)


def sparse_model() -> Any:
    """The same, with zeros."""
    model = dense_model()
    hf_sparse.prune_(model, CONFIG, "magnitude")
    return model


LARGEST = 4 * 2 * _WIDTH * _WIDTH


@dataclass(frozen=True)
class Bound:
    """A call, and how much memory it may take.

    Attributes:
        make: what it is given, made before the bound holds.
        call: of what `make` gave, and an empty folder.
        nbytes: that its docstring tells.
        mapped: of files that it maps.
    """

    make: Callable[[], Any]
    call: Callable[[Any, Path], object]
    nbytes: int
    mapped: int = 0


def _saved() -> Any:
    folder = tempfile.TemporaryDirectory()
    hf_sparse.save_pretrained(sparse_model(), folder.name, CONFIG)
    return folder


BOUNDS: dict[str, Bound] = {
    # one layer's scores
    "prune_ by magnitude": Bound(
        dense_model, lambda model, _: hf_sparse.prune_(model, CONFIG, "magnitude"), 8 * LARGEST
    ),
    # some copies of the largest weight
    "quantize_": Bound(
        dense_model, lambda model, _: hf_sparse.quantize_(model, bits=8), 8 * LARGEST
    ),
    # beside the model, one shard
    "save_pretrained": Bound(
        sparse_model,
        lambda model, folder: hf_sparse.save_pretrained(
            model, folder, CONFIG, max_shard_size="20MB"
        ),
        20 * _MB + 8 * LARGEST,
    ),
    # one tensor
    "inspect_checkpoint": Bound(
        _saved,
        lambda folder, _: hf_sparse.inspect_checkpoint(folder.name),
        8 * LARGEST,
        mapped=150 * _MB,
    ),
}


def data_bytes() -> int:
    """What counts to this process's `RLIMIT_DATA`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


def is_kept(bound: Bound, share: float = 1.0) -> bool:
    """Whether a call ends well in a process that can take no more than a share of its bound."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = _child(bound, share)
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def _child(bound: Bound, share: float) -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as room, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = bound.make()
        most = data_bytes() + int(share * (bound.nbytes + bound.mapped + _MORE))
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
        try:
            bound.call(given, Path(room) / "out")
        except (MemoryError, RuntimeError, OSError) as error:
            print(f"{error!r}"[:200], flush=True)
            return 1
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
    return 0


def main() -> int:
    """Run; the exit status is 1 if a bound is too small."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--call", action="append", choices=list(BOUNDS))
    asked = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    broken = 0
    for name in asked.call or BOUNDS:
        bound = BOUNDS[name]
        kept = is_kept(bound)
        broken += not kept
        told = "is enough" if kept else "is NOT ENOUGH"
        room = (bound.nbytes + bound.mapped + _MORE) / _MB
        print(f"{name:20} {room:6.1f} MB beyond what it had: {told}", flush=True)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
