"""How long the kernels take: measured once on this machine, or nominal figures."""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_sparse.runtime.kernels import spmm
from hf_sparse.runtime.kernels.all import kernels
from hf_sparse.runtime.kernels.call import run
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.weights.memory import aligned
from hf_sparse.runtime.weights.panels import pack

# A layer of BERT-base's size, tokens of one tile.
_ROWS, _COLUMNS, _REPEATS = 768, 768, 9


@dataclass(frozen=True)
class Rates:
    """Effective speed of the `spmm` kernels, in GF/s per core, over the density of blocks.

    Attributes:
        densities: fractions of blocks that are not zero, ascending.
        speeds: for each height of a block, a speed at each density.
    """

    densities: tuple[float, ...]
    speeds: dict[int, tuple[float, ...]]

    def rate(self, height: int, density: float) -> float:
        """GF/s of stored weights, interpolated."""
        return float(np.interp(density, self.densities, self.speeds[height]))


# Of the machine in docs/results.md; only their proportions matter for choosing a kernel.
NOMINAL = Rates(
    (0.05, 0.1, 0.2, 0.5, 1.0),
    {
        1: (117.0, 149.0, 166.0, 177.0, 177.0),
        2: (180.0, 206.0, 230.0, 242.0, 242.0),
        4: (230.0, 250.0, 250.0, 250.0, 250.0),
    },
)


@functools.cache
def calibrate(target: Target, cache: Path | None) -> Rates:
    """Measure the rates of this machine, on one thread: about a second, once per process."""
    code = kernels(target, cache)
    random = np.random.default_rng(0)
    width = target.widths[0]
    x, y = aligned(_COLUMNS, width).fill_(1.0), aligned(_ROWS, width)
    speeds: dict[int, tuple[float, ...]] = {}
    for height in NOMINAL.speeds:
        found = []
        for density in NOMINAL.densities:
            kept = random.random((_ROWS // height, _COLUMNS)) < density
            weight = np.repeat(kept, height, axis=0).astype(np.float32)
            packed = pack(weight, height)
            operation = packed.operation(0, 4, x.data_ptr(), y.data_ptr(), 0, spmm.START_SUM)
            times = []
            for _ in range(_REPEATS):
                start = time.perf_counter()
                run(code, operation)
                times.append(time.perf_counter() - start)
            found.append(2 * packed.stored * width / statistics.median(times) / 1e9)
        speeds[height] = tuple(found)
    return Rates(NOMINAL.densities, speeds)
