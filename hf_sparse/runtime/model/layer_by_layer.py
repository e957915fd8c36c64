"""Models whose blocks are not compiled as a whole: each sparse layer alone, torch does the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.model.copying import with_modules
from hf_sparse.runtime.model.faithful import check_parents
from hf_sparse.runtime.model.plain import check_parameters, is_plain_matrix
from hf_sparse.runtime.model.single_layers import CompiledLinear
from hf_sparse.runtime.programs.pool import KEPT_BYTES, Pool
from hf_sparse.runtime.programs.program import Program
from hf_sparse.runtime.weights.linear import pack_linear
from hf_sparse.runtime.weights.memory import Shelf
from hf_sparse.runtime.weights.rates import nominal
from hf_sparse.structure.layers import target_layers
from hf_sparse.upstream.peft_by_name import is_of_peft

# A single layer with fewer zeros is left to torch, with which it shares the layout of activations.
MIN_SPARSITY = 0.4


def with_compiled_layers(
    model: PreTrainedModel, reason: str, target: Target, cache: Path | None
) -> PreTrainedModel:
    """A copy of a model with a compiled layer in place of each sparse one of its blocks.

    Args:
        model: to copy; dense tensors are shared.
        reason: why its blocks are not compiled as a whole, for an error message.
        target, cache: as `compile`'s.

    Raises:
        ValueError: no layer has enough zeros.
    """
    shelf, pool = Shelf(), Pool[Program | Tensor](KEPT_BYTES)
    replaced: dict[nn.Module, nn.Module] = {}
    left, adapted = "", _in_adapters(model)
    for layer in target_layers(model):
        weight = layer.weight
        zeros = 1 - int(torch.count_nonzero(weight)) / weight.numel()
        if zeros >= MIN_SPARSITY and layer.module in adapted:
            left = f" {layer.name} is left to torch: it lies in an adapter. Merge that first."
        elif zeros >= MIN_SPARSITY and not is_plain_matrix(layer.module):
            left = f" {layer.name} is left to torch: it is no plain Linear, or it has hooks."
        elif zeros >= MIN_SPARSITY:
            bias: Any = layer.module.bias
            packed = pack_linear(layer.name, weight, bias, shelf=shelf, rates=nominal(target))
            replaced[layer.module] = CompiledLinear(packed, target, cache, pool)
    if not replaced:
        raise ValueError(
            f"{type(model).__name__} is not compiled: {reason}; and no plain layer of its blocks has "
            f"{100 * MIN_SPARSITY:.0f} % zeros, which single layers need.{left or ' Prune it first.'}"
        )
    check_parents(model, list(replaced))
    compiled = with_modules(model, replaced)
    check_parameters(compiled)
    return compiled


def _in_adapters(model: nn.Module) -> set[nn.Module]:
    """Layers inside modules of PEFT, many of which read the weight and do not call the layer."""
    return {
        child for module in model.modules() if is_of_peft(module) for child in module.children()
    }
