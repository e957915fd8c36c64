"""Tensors with NaN or infinity are told by name and number, whatever their type."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_sparse.arguments import check_finite, is_finite

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_counted(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.ones(3, 5)
    tensor[1, 2] = tensor[2, 4] = float("nan") if dtype == torch.float8_e4m3fn else bad
    tensor = tensor.to(dtype)
    with pytest.raises(
        ValueError, match=r"^up\.weight has 2 values that are NaN or infinite; wanted"
    ):
        check_finite("up.weight", tensor)
    check_finite("up.weight", torch.ones(3, 5).to(dtype))


def test_parameters_integers_and_empty_tensors_are_finite() -> None:
    for tensor in (nn.Parameter(torch.ones(2)), torch.ones(2, dtype=torch.int8), torch.ones(0, 3)):
        assert is_finite(tensor)
