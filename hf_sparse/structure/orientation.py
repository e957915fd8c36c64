"""Which way round a module stores its weights."""

from __future__ import annotations

from torch import Tensor, nn

from hf_sparse.structure.experts import ExpertStack
from hf_sparse.structure.layers import is_conv1d


def is_transposed(module: nn.Module, attribute: str) -> bool:
    """Whether a module stores a weight, or each of a stack, as `(in_features, out_features)`."""
    stack = ExpertStack.of(module)
    if stack is not None and attribute in stack.parameters:
        return attribute in stack.turned
    return attribute == "weight" and is_conv1d(module)


def transposed_weights(model: nn.Module) -> dict[str, bool]:
    """Whether each parameter is stored `(in_features, out_features)`, by its name."""
    modules = dict(model.named_modules())
    return {
        name: is_transposed(modules[path], attribute)
        for name, _ in model.named_parameters(remove_duplicate=False)
        for path, _, attribute in [name.rpartition(".")]
    }


def oriented(weight: Tensor, transposed: bool) -> list[Tensor]:
    """The matrices of a stored weight, one or a stack, as `(out_features, in_features)`: views."""
    turned = weight.mT if transposed else weight
    return [turned] if turned.ndim == 2 else list(turned)
