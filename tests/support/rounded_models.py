"""Models as compiled ones of few bits compute them, in torch: rounded weights and features."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.quantization import Grid
from hf_sparse.runtime.model.coding import GRIDS
from hf_sparse.runtime.weights.rounding import nearest
from hf_sparse.structure.layers import block_layers, is_conv1d
from tests.support.code_references import dequantised, quantise_ref

# Tokens that the output head multiplies one by one.
_FEW = 4


def rounded_weight(weight: Tensor, grid: Grid) -> Tensor:
    """The values of the nearest codes, float32."""
    codes = nearest(weight, grid)
    size = grid.group_size or weight.shape[1]
    return torch.from_numpy(dequantised(codes.codes.numpy(), codes.scales.numpy(), size))


def rounded_features(x: Tensor) -> Tensor:
    """Features `(..., n)` rounded to eight bits, 64 at a time."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]).numpy():
        codes, scales = quantise_ref(row)
        rows.append((codes * scales[:, None]).reshape(-1)[: len(row)])
    return torch.stack([torch.from_numpy(row).float() for row in rows]).view(x.shape)


class Rounded(nn.Module):
    """A layer with a rounded weight, which rounds its features."""

    def __init__(self, weight: Tensor, bias: Tensor | None, plain: Tensor | None = None) -> None:
        super().__init__()
        # Of a head: the weight of more tokens.
        self.rounded, self.plain, self.bias = weight, plain, bias

    def forward(self, x: Tensor) -> Tensor:
        if self.plain is not None:
            if x.numel() // x.shape[-1] > _FEW:
                return nn.functional.linear(x, self.plain, self.bias)
            return nn.functional.linear(rounded_features(x), self.rounded, self.bias)
        return nn.functional.linear(rounded_features(x), self.rounded, self.bias)


def rounded_model(model: PreTrainedModel, bits: int) -> Any:
    """A copy whose layers are `Rounded`, and its head, in eight bits."""
    twin: Any = copy.deepcopy(model)
    for layer in block_layers(twin):
        weight, module = layer.weight, layer.module
        assert isinstance(module, nn.Linear) or is_conv1d(module)
        path, _, name = layer.name.rpartition(".")
        made = Rounded(rounded_weight(weight, GRIDS[bits]), getattr(module, "bias", None))
        setattr(twin.get_submodule(path), name, made)
    head = twin.get_output_embeddings()
    plain = head.weight.detach()
    twin.lm_head = Rounded(rounded_weight(plain, GRIDS[8]), head.bias, plain)
    return twin
