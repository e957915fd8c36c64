"""How long the kernels take: measured once on this machine, or nominal figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
