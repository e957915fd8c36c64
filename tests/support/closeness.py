"""Whether floats that torch computed twice are the same but for their last bits.

Another alignment of a weight in memory, another CPU or another number of threads changes the order of
sums. Tests of such floats ask here; `torch.equal` is for what was copied, counted or decoded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def same(one: Tensor, other: Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> bool:
    """Whether two tensors have one shape and type, and the same values but for their last bits."""
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.allclose(one, other, rtol=rtol, atol=atol, equal_nan=True)


def nearly_same(one: Tensor, other: Tensor, share: float = 0.98) -> bool:
    """The same for a share of the values: where a last bit may decide which weight becomes zero."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    close = torch.isclose(one.float(), other.float(), rtol=1e-2, atol=1e-4, equal_nan=True)
    return bool(close.float().mean() >= share)


def nearly_the_same_zeros(one: Tensor, other: Tensor, share: float = 0.8) -> bool:
    """Whether two tensors are zero at the same places, but for a share of them.

    For solvers that solve over and over on their own results, and so make a last bit grow: there two
    runs choose nearly the same zeros, and other values beside them. At a sparsity of 0.6 two random
    choices agree at a share of 0.52.
    """
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and bool(((one == 0) == (other == 0)).float().mean() >= share)
