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
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

from hf_sparse.arguments import check_has_value
from hf_sparse.runtime.model.exchanged import why_not_own

# transformers' own hooks, which collect outputs and change none: they are installed again.
_COLLECTING = "transformers.utils.output_capturing"
# Where modules keep their hooks; those for the backward pass never run without gradients.
HOOKS = ("_forward_pre_hooks", "_forward_hooks")


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
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and type(tensor.data) is not Tensor:
            return f"has a {name} of type {type(tensor.data).__name__}"
        if tensor is not None and name in module._parameters and not tensor.is_floating_point():
            return f"has a {name} of {tensor.dtype}: it is quantized"
    return None


def is_plain_matrix(module: nn.Module) -> bool:
    """Whether a module is a plain Linear or Conv1D, and nothing else happens in it."""
    return type(module) in (nn.Linear, Conv1D) and why_not_plain(module) is None


def own_forward(module: nn.Module) -> bool:
    """Whether a module has a `forward` that is not its class's."""
    forward = vars(module).get("forward")
    if forward is None or _only_moves(module):
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
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
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
    for kind in HOOKS:
        for hook in getattr(module, kind).values():
            if getattr(hook, "__module__", None) != _COLLECTING:
                name = getattr(hook, "__qualname__", type(hook).__name__)
                return f"has a {kind.strip('_').replace('_', ' ')[:-1]}, {name}"
    hook = vars(module).get("_hf_hook")
    if hook is not None and not _only_moves(module):
        return f"has a hook of accelerate, {type(hook).__name__}"
    return None


def _only_moves(module: nn.Module) -> bool:
    """Whether a module's `forward` was wrapped by accelerate to move inputs, which are here already."""
    hook, forward = vars(module).get("_hf_hook"), vars(module).get("_old_forward")
    if type(hook).__name__ != "AlignDevicesHook" or getattr(hook, "offload", True):
        return False
    device: Any = getattr(hook, "execution_device", None)
    here = device is None or (not isinstance(device, int) and torch.device(device).type == "cpu")
    return here and getattr(forward, "__func__", None) is type(module).forward
