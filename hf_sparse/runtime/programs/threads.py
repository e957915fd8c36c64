"""Running a program of kernels on torch's own threads.

torch has loaded an OpenMP runtime. Its `GOMP_parallel` runs our worker in the pool that torch's
operations use, so there is no second pool and no core is asked for twice.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class OpenMP:
    """Addresses in the OpenMP runtime that torch uses."""

    parallel: int
    thread_number: int
    thread_count: int
    give_way: int


@functools.cache
def openmp() -> OpenMP | None:
    """The OpenMP runtime that this process has loaded, or None (and a warning) if there is none."""
    found = _loaded_runtime()
    if found is None:
        warnings.warn(
            "no OpenMP runtime is loaded in this process, so compiled models run on one thread. "
            "The builds of torch for Linux bring one.",
            stacklevel=2,
        )
        return None
    library, process = ctypes.CDLL(found), ctypes.CDLL(None)

    def address(library: ctypes.CDLL, symbol: str) -> int:
        return ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value or 0

    return OpenMP(
        address(library, "GOMP_parallel"),
        address(library, "omp_get_thread_num"),
        address(library, "omp_get_num_threads"),
        address(process, "sched_yield"),
    )


def team(lists: int) -> int:
    """How many threads run `lists` lists: one each, but no more than there are cores for them.

    Threads that wait at a barrier while the one that they wait for has no core make every phase as
    long as a turn of the scheduler: 150 phases of 8 threads took 1.2 s on two busy cores.
    """
    return min(lists, len(os.sched_getaffinity(0)))


def _loaded_runtime() -> str | None:
    """The file of the loaded OpenMP runtime that torch brought."""
    if sys.platform != "linux":
        return None
    with open("/proc/self/maps") as maps:
        files = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
    named = sorted(f for f in files if any(n in f for n in ("libgomp", "libomp", "libiomp")))
    of_torch = [file for file in named if "torch" in file]
    return next(iter([*of_torch, *named]), None)
