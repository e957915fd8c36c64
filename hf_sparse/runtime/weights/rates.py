"""How long the kernels take: measured once on this machine, or nominal figures of a target."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hf_sparse.runtime.kernels import spmm
from hf_sparse.runtime.kernels.all import kernels
from hf_sparse.runtime.kernels.call import run
from hf_sparse.runtime.kernels.weight_types import WeightType
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.weights.memory import aligned
from hf_sparse.runtime.weights.panels import PANEL_COLUMNS, pack_many

# A layer of BERT-base's size, tokens of one tile.
_ROWS, _COLUMNS, _REPEATS = 768, 768, 9


# Kernels for single tokens: all weights, or those whose bits are set; others have a window's name.
DENSE, MASK = "dense", "mask"


@dataclass(frozen=True)
class RowRates:
    """How fast a core multiplies weights with single tokens.

    Attributes:
        bandwidth: bytes that it reads from memory in a nanosecond, while others read, too.
        speeds: by kernel, the nanoseconds for 1000 weights that are in its cache, zeros counted: of
            four bytes, and of two.
        codes: the same for codes of few bits, by the names of their formats.
    """

    bandwidth: float
    speeds: dict[str, tuple[float, float]]
    codes: dict[str, float]

    def nanoseconds(
        self, kernel: str, nbytes: float, weights: int, weight_type: WeightType
    ) -> float:
        """The time for a weight that comes from memory, which overlaps in part with computing."""
        computing = self.speeds[kernel][weight_type.size == 2] * weights / 1000
        return math.hypot(nbytes / self.bandwidth, computing)

    def code_nanoseconds(self, name: str, nbytes: float, weights: int) -> float:
        """The same for codes of a format."""
        return math.hypot(nbytes / self.bandwidth, self.codes[name] * weights / 1000)


@dataclass(frozen=True)
class Rates:
    """Effective speed of the `spmm` kernels, in GF/s per core, over the density of blocks.

    Attributes:
        rows: speed of the kernels for single tokens.
        densities: fractions of blocks that are not zero, ascending.
        speeds: for each height of a block, a speed at each density.
        panel_columns: of a weight, whose rows of a tile stay in L1 together with the sums.
    """

    densities: tuple[float, ...]
    speeds: dict[int, tuple[float, ...]]
    rows: RowRates
    panel_columns: int = PANEL_COLUMNS

    def rate(self, height: int, density: float) -> float:
        """GF/s of stored weights, interpolated."""
        return float(np.interp(density, self.densities, self.speeds[height]))


# What was measured, for each of these targets. Of tiles: AVX-512 of the machine in docs/results.md,
# AVX2 of a Zen 3, portable of a Sapphire Rapids' SSE, as all of single tokens
# (`benchmarks/one_token.py`); those of codes are of a Zen 5. Only their proportions matter for choosing
# a kernel.
_TARGETS = ("avx512", "avx2", "portable")
_DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
_TILE_SPEEDS = {
    1: (
        (117.0, 149.0, 166.0, 177.0, 177.0),
        (48.0, 55.0, 61.0, 65.0, 65.0),
        (28.0, 28.0, 31.0, 31.0, 31.0),
    ),
    2: (
        (180.0, 206.0, 230.0, 242.0, 242.0),
        (57.0, 66.0, 72.0, 78.0, 78.0),
        (26.0, 29.0, 31.0, 32.0, 32.0),
    ),
    4: (
        (230.0, 250.0, 250.0, 250.0, 250.0),
        (72.0, 77.0, 81.0, 87.0, 90.0),
        (29.0, 29.0, 31.0, 32.0, 32.0),
    ),
}
_PANEL_COLUMNS = (PANEL_COLUMNS, 192, PANEL_COLUMNS)
_BANDWIDTH = (14.0, 12.0, 12.0)
_ROW_SPEEDS = {
    DENSE: ((40.0, 40.0), (60.0, 60.0), (80.0, 105.0)),
    MASK: ((80.0, 75.0), (160.0, 110.0), (180.0, 140.0)),
    "2 of 8": ((15.0, 16.0), (20.0, 20.0), (132.0, 140.0)),
    "4 of 8": ((38.0, 36.0), (46.0, 50.0), (280.0, 280.0)),
    "8 of 16": ((39.0, 33.0), (60.0, 62.0), (450.0, 450.0)),
}
_CODE_SPEEDS = {
    "int8 dense": (6.2, 10.2, 21.7),
    "int8 2 of 4": (3.6, 10.1, 21.1),
    "int8 8 of 16": (4.2, 8.6, 17.5),
    "int8 4 of 16": (2.3, 4.7, 9.9),
    "int8 mask": (8.0, 110.0, 140.0),
    "int4 dense": (3.9, 8.3, 17.5),
    "int4 2 of 4": (4.1, 11.0, 25.4),
    "int4 4 of 16": (3.1, 4.9, 11.2),
}


Measured = TypeVar("Measured")


def _rates(target: int) -> Rates:
    """The column of a target."""

    def column(table: Mapping[Any, Sequence[Measured]]) -> dict[Any, Measured]:
        return {name: each[target] for name, each in table.items()}

    rows = RowRates(_BANDWIDTH[target], column(_ROW_SPEEDS), column(_CODE_SPEEDS))
    return Rates(_DENSITIES, column(_TILE_SPEEDS), rows, _PANEL_COLUMNS[target])


NOMINAL = {name: _rates(number) for number, name in enumerate(_TARGETS)}
# The lanes of what was measured.
_LANES = {"avx512": 16, "avx2": 8, "portable": 4}


def nominal(target: Target) -> Rates:
    """The rates of a target, or where it was not measured those of vectors like its own."""
    alike = min(_LANES, key=lambda name: abs(_LANES[name] - target.lanes))
    return NOMINAL.get(target.name, NOMINAL[alike])


@functools.cache
def calibrate(target: Target, cache: Path | None) -> Rates:
    """Measure the rates of this machine, on one thread: about a second, once per process.

    Times are the least of a few: other programs only add to them. Rates for single tokens, which
    depend on the memory that all cores share, are nominal.
    """
    code = kernels(target, cache)
    random = np.random.default_rng(0)
    width = target.widths[0]
    x, y = aligned(_COLUMNS, width).fill_(1.0), aligned(_ROWS, width)
    speeds: dict[int, tuple[float, ...]] = {}
    usual = nominal(target)
    for height in usual.speeds:
        measured = []
        for density in usual.densities:
            kept = random.random((_ROWS // height, _COLUMNS)) < density
            weight = np.repeat(kept, height, axis=0).astype(np.float32)
            (packed,) = pack_many([(weight, height)], panel_columns=usual.panel_columns)
            operation = packed.operation(0, 4, x.data_ptr(), y.data_ptr(), 0, spmm.START_SUM)
            times = []
            for _ in range(_REPEATS):
                start = time.perf_counter()
                run(code, operation)
                times.append(time.perf_counter() - start)
            measured.append(2 * packed.stored * width / min(times) / 1e9)
        speeds[height] = tuple(measured)
    return replace(usual, speeds=speeds)
