"""From a weight to packed codes: those that it has already, or the nearest ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_sparse.quantization import Codes, Grid, codes_of, fitted_scales, nearest_codes
from hf_sparse.runtime.weights.codes import CodeWeight, find_patterns, format_for, pack_codes
from hf_sparse.runtime.weights.memory import Shelf
from hf_sparse.runtime.weights.rates import RowRates
from hf_sparse.runtime.weights.single_rows import MIN_GAIN

# Weights that are rounded together: bounds the working memory to about 40 MB.
_TOGETHER = 1 << 20


@dataclass(frozen=True)
class Coding:
    """How a weight becomes codes.

    Attributes:
        grid: what the codes are of.
        exact: the weight lies on it, and its codes are found; else the nearest ones are taken.
    """

    grid: Grid
    exact: bool = False

    def codes(self, weight: Tensor) -> Codes:
        """The codes of a weight `(rows, columns)`.

        Raises:
            OffGridError: it should lie on the grid, and does not.
        """
        weight = weight.detach()
        return codes_of(weight, self.grid) if self.exact else nearest(weight, self.grid)


def nearest(weight: Tensor, grid: Grid) -> Codes:
    """Round a weight `(rows, columns)` to a grid, whatever the number of its columns: zeros stay zeros.

    Memory:
        Codes and scales, and about 40 MB.
    """
    columns = weight.shape[1]
    size = grid.group_size or max(columns, 1)
    step = max(1, _TOGETHER // max(columns, 1))
    found = []
    for part in weight.split(step):
        padded = torch.nn.functional.pad(part.detach().float(), (0, -columns % size))
        found.append(nearest_codes(padded, fitted_scales(padded, grid), grid))
    return Codes(
        torch.cat([one.codes[:, :columns] for one in found]),
        torch.cat([one.scales for one in found]),
    )


def pack_nearest(codes: Codes, grid: Grid, rates: RowRates, shelf: Shelf) -> CodeWeight | None:
    """Pack codes for the kernel that is predicted to be fastest.

    Args:
        codes: of a weight `(rows, columns)`.
        grid: that they are of. Codes with zero points go in 8 bits.
        rates: of the kernels.
        shelf: where they are put.

    Returns:
        None if some codes have no room in 8 bits, which zero points can make.
    """
    numbers, scales = codes.codes.numpy(), codes.scales.numpy()
    most = int(np.abs(numbers).max(initial=0))
    if most > 127:
        return None
    bits = 4 if grid.bits == 4 and grid.symmetric else 8
    numbers = np.ascontiguousarray(numbers.astype(np.int8, copy=False))
    size = grid.group_size or max(numbers.shape[1], 1)
    seconds, density = {}, float(np.count_nonzero(numbers)) / max(numbers.size, 1)
    for pattern in find_patterns(numbers, bits):
        form = format_for(bits, pattern, size)
        seconds[form] = rates.code_nanoseconds(
            form.name, form.bytes_for(density) * numbers.size, numbers.size
        )
    best = min(seconds, key=lambda form: seconds[form])
    dense = next(form for form in seconds if form.is_dense)
    chosen = best if seconds[best] < (1 - MIN_GAIN) * seconds[dense] else dense
    return pack_codes(numbers, scales, size, chosen, shelf)
