"""A weight as the kernels for single tokens read it: which of them is fastest, and its operation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_sparse.runtime.kernels.call import Operation
from hf_sparse.runtime.kernels.shuffled_rows import Window
from hf_sparse.runtime.kernels.single_token import COLUMNS, DENSE_ROWS, GROUP
from hf_sparse.runtime.kernels.weight_types import WEIGHT_TYPES, WeightType
from hf_sparse.runtime.weights.codes import CodeWeight
from hf_sparse.runtime.weights.memory import Shelf
from hf_sparse.runtime.weights.rates import DENSE, MASK, RowRates
from hf_sparse.runtime.weights.rows import DecodeWeight, pack_decode
from hf_sparse.runtime.weights.shuffled import ShuffledWeight, find_window, pack_shuffled

# Those of codes read features in eight bits, the others floats.
SingleWeight = DecodeWeight | ShuffledWeight | CodeWeight | Tensor

# Zeros must save this fraction of the dense kernel's time: predictions are no closer than that.
MIN_GAIN = 0.1


def choose_kernel(
    weight: np.ndarray, zeros: int, weight_type: WeightType, rates: RowRates
) -> str | Window:
    """The kernel that is predicted to multiply a weight with one token in the least time.

    Args:
        weight: `(rows, columns)`.
        zeros: how many there are.
        weight_type: in which it is stored.
        rates: of the kernels.

    Returns:
        DENSE, MASK, or the window of the kernel that shuffles x.
    """
    size, kept = weight.size, weight.size - zeros
    dense = rates.nanoseconds(DENSE, size * weight_type.size, size, weight_type)
    mask_bytes = kept * weight_type.size + size / 8
    seconds: dict[str | Window, float] = {
        MASK: rates.nanoseconds(MASK, mask_bytes, size, weight_type)
    }
    window = find_window(weight)
    if window is not None:
        nbytes = size * window.bytes_for(weight_type)
        seconds[window] = rates.nanoseconds(window.name, nbytes, size, weight_type)
    best = min(seconds, key=lambda kernel: seconds[kernel])
    return best if seconds[best] < (1 - MIN_GAIN) * dense else DENSE


def can_share(weight: np.ndarray) -> bool:
    """Whether the dense kernel for single tokens can read a weight as torch stores it."""
    return not (weight.shape[0] % GROUP or weight.shape[1] % COLUMNS)


def pack_single(
    weight: np.ndarray, kernel: str | Window, weight_type: WeightType, shelf: Shelf
) -> SingleWeight:
    """The weight for the kernel that was chosen; for the dense one in whole groups and vectors."""
    if isinstance(kernel, Window):
        return pack_shuffled(weight, kernel, weight_type).on(shelf)
    if kernel == MASK:
        return pack_decode(weight, weight_type).on(shelf)
    rows, columns = (
        -(-size // unit) * unit for size, unit in zip(weight.shape, (GROUP, COLUMNS), strict=True)
    )
    padded = np.zeros((rows, columns), np.float32)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    return torch.from_numpy(shelf.place(weight_type.narrow(padded))).view(weight_type.dtype)


def kernel_of(single: SingleWeight) -> str:
    """What `explain` calls the kernel that multiplies it."""
    if isinstance(single, CodeWeight):
        return single.form.name
    if isinstance(single, ShuffledWeight):
        return f"shuffled {single.window.name}"
    return MASK if isinstance(single, DecodeWeight) else DENSE


def row_operation(
    single: SingleWeight, x: int, y: int, bias: int, first: int, last: int, *, add: bool
) -> Operation:
    """Multiply rows `first` to `last` with one token; addresses are those of row 0."""
    if not isinstance(single, Tensor):
        return single.operation(x, y, bias, first, last, add=add)
    weight_type = WEIGHT_TYPES[single.dtype]
    stride = weight_type.size * single.shape[1]
    return DENSE_ROWS.operation(
        f"dense_rows{weight_type.suffix}",
        weight=single.data_ptr() + first * stride,
        row_bytes=stride,
        columns=single.shape[1],
        x=x,
        y=y + 4 * first,
        bias=bias and bias + 4 * first,
        groups=-(-(last - first) // GROUP),
        add=int(add),
    )
