"""What training a block and training a whole model have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def trainable(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters of the module and for no others, for a while."""
    known = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    chosen = set(map(id, parameters))
    for parameter, _ in known:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, flag in known:
            parameter.requires_grad_(flag)


def is_bfloat16_faster(tensor: Tensor) -> bool:
    """Whether this is an fp32 tensor on a CPU that multiplies faster in bfloat16."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def fast_autocast(tensor: Tensor) -> torch.autocast:
    """Products in bfloat16 where those of a CPU's fp32 tensors like this one are faster in it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16_faster(tensor))
