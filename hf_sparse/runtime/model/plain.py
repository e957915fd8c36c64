"""Plain modules: they compute what their class computes, with tensors that are here.

Machine code in place of a module knows its class and its weights. Hooks, a `forward` of the instance's
own, a patched class and tensors of other kinds would be lost in silence, so they are found first.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_sparse.arguments import check_finite, check_has_value
from hf_sparse.runtime.model.exchanged import why_not_own
from hf_sparse.upstream.accelerate import hook_of, moves_inputs_alone
from hf_sparse.upstream.torch import (
    buffers_of,
    forward_hooks,
    has_global_forward_hooks,
    parameters_of,
)
from hf_sparse.upstream.transformers.models import collects_outputs

COMPUTABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def why_not_plain(module: nn.Module) -> str | None:
    """What a module does beside its class, or None; its children are not looked at."""
    return why_instance_not_plain(module) or _patched_class(module)


def why_instance_not_plain(module: nn.Module) -> str | None:
    """The same, but for what was done to its class."""
    if own_forward(module):
        return "has a forward of its own, which was put on the instance"
    found = _hooked(module)
    if found is not None:
        return found
    parameters = parameters_of(module)
    for name, tensor in [*parameters.items(), *buffers_of(module).items()]:
        if tensor is not None and type(tensor.data) is not Tensor:
            return f"has a {name} of type {type(tensor.data).__name__}"
        if tensor is not None and name in parameters and not tensor.is_floating_point():
            return f"has a {name} of {tensor.dtype}: it is quantized"
    return None


def is_plain_matrix(module: nn.Module) -> bool:
    """Whether a module is a plain Linear or Conv1D, and nothing else happens in it."""
    return type(module) in (nn.Linear, Conv1D) and why_not_plain(module) is None


def own_forward(module: nn.Module) -> bool:
    """Whether a module has a `forward` that is not its class's."""
    forward = vars(module).get("forward")
    if forward is None or moves_inputs_alone(module):
        return False
    same = isinstance(forward, MethodType) and forward.__self__ is module
    return not (same and forward.__func__ is type(module).forward)


def foreign_forward(module: nn.Module) -> bool:
    """Whether a module's `forward` was put on the instance, and stays another's in a copy.

    Methods of the module itself, and partial functions of it, become those of the copy.
    """
    forward = vars(module).get("forward")
    owners: Any = [getattr(forward, "__self__", None)]
    if isinstance(forward, functools.partial):
        owners = forward.args
    return forward is not None and all(owner is not module for owner in owners)


def check_no_global_hooks() -> None:
    """Raise a ValueError if torch calls hooks for every module there is."""
    if has_global_forward_hooks():
        raise ValueError(
            "torch has global forward hooks (torch.nn.modules.module.register_module_forward_hook): "
            "a compiled model does not call the modules that it replaced. Remove them first."
        )


def check_in_memory(model: nn.Module) -> None:
    """Raise a ValueError unless all of a model is in memory and on the CPU."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        check_has_value(name, tensor, "compile")
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{name} is on {tensor.device}; wanted the CPU: model.to('cpu') first."
            )


def check_dropout(model: nn.Module) -> None:
    """Raise a ValueError if a model in eval mode has parts that drop out all the same."""
    for name, module in model.named_modules():
        if not model.training and module.training and _drops(module):
            raise ValueError(
                f"{name} is in training mode, and the model is not: its dropout would be lost, since a "
                "compiled model has none. Call model.eval() first."
            )


def _drops(module: nn.Module) -> bool:
    for name in ("p", "dropout", "attention_dropout", "attn_dropout"):
        value: Any = getattr(module, name, 0)
        if getattr(value, "p", value) not in (0, None):
            return True
    return False


def _patched_class(module: nn.Module) -> str | None:
    found = why_not_own(type(module))
    return None if found is None else f"is a {type(module).__name__}, whose {found}"


def _hooked(module: nn.Module) -> str | None:
    for kind, hook in forward_hooks(module):  # those for the backward pass never run here
        if not collects_outputs(hook):  # the copy that is compiled gets new ones of these
            return f"has a {kind}, {getattr(hook, '__qualname__', type(hook).__name__)}"
    hook = hook_of(module)
    if hook is not None and not moves_inputs_alone(module):
        return f"has a hook of accelerate, {type(hook).__name__}"
    return None


def check_types(model: nn.Module) -> None:
    """Raise a ValueError unless torch can compute with the types of all parameters, row by row."""
    for name, parameter in model.named_parameters():
        if parameter.layout != torch.strided:
            raise ValueError(
                f"{name} has the layout {parameter.layout}; wanted {torch.strided}. Store its "
                "to_dense() in its place: compile finds the zeros."
            )
        if parameter.is_floating_point() and parameter.dtype not in COMPUTABLE:
            wanted = ", ".join(map(str, COMPUTABLE))
            raise ValueError(
                f"{name} is {parameter.dtype}; wanted one of {wanted}: model.to(torch.bfloat16) first."
            )


def check_parameters(model: nn.Module) -> None:
    """Raise a ValueError unless the parameters that are not packed are finite."""
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.detach())
