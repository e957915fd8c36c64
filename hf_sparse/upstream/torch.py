"""What torch keeps private, or has in some builds only.

The functions on lists of tensors are torch's own under plain names: optimizers call them at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules_of_torch
from torch.nn.modules.module import register_module_buffer_registration_hook as on_buffers
from torch.nn.modules.module import register_module_parameter_registration_hook as on_parameters
from torch.optim.adamw import adamw as adamw_step
from torch.optim.optimizer import ParamsT, register_optimizer_step_post_hook
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = [
    "AROUND_FORWARD",
    "ParamsT",
    "adamw_step",
    "all_hooks",
    "buffers_of",
    "bytes_of",
    "children_of",
    "copy_forward_hooks_",
    "foreach_clamp_max",
    "foreach_clamp_min_",
    "foreach_div_",
    "foreach_mul_",
    "foreach_neg",
    "foreach_sub_",
    "forward_hooks",
    "hardshrink_into",
    "has_forward_hooks",
    "has_global_forward_hooks",
    "has_hooks",
    "is_compiled",
    "is_layer_of_torch",
    "on_buffers",
    "on_parameters",
    "onednn",
    "parameters_of",
    "register_optimizer_step_post_hook",
    "saved_tensors",
    "set_children_",
    "softshrink_into",
    "tree_flatten",
    "tree_unflatten",
    "wrapped_by_compile",
]

foreach_clamp_max = torch._foreach_clamp_max
foreach_clamp_min_ = torch._foreach_clamp_min_
foreach_div_ = torch._foreach_div_
foreach_mul_ = torch._foreach_mul_
foreach_neg = torch._foreach_neg
foreach_sub_ = torch._foreach_sub_
# `softshrink_into(weights, threshold, out=weights)`: torch.nn.functional has none in place.
softshrink_into: Callable[..., Tensor] = torch.ops.aten.softshrink.out
hardshrink_into: Callable[..., Tensor] = torch.ops.aten.hardshrink.out

# The methods of `nn.Module` that run around every `forward`.
AROUND_FORWARD = (
    "__call__",
    "_call_impl",
    "_wrapped_call_impl",
    "__getattr__",
    "__getattribute__",
)
# Where modules keep the hooks of a call, of its backward pass, and of their state dict.
_FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_BACKWARD_HOOKS = ("_backward_pre_hooks", "_backward_hooks")
_CALL_HOOKS = (*_FORWARD_HOOKS, *_BACKWARD_HOOKS)
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in one row, on the CPU; of one that is contiguous there, without a copy.

    torch views numbers as bytes where neighbours lie side by side, which it also asks of a single
    number: that may have any stride.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def onednn(operation: str) -> Callable[..., Any] | None:
    """An operation of oneDNN; None if torch was built without oneDNN, or has no such operation."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, operation, None)


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The places for children in a module, by name, with None where a place is empty."""
    return module._modules


def set_children_(module: nn.Module, children: dict[str, nn.Module | None]) -> None:
    """Give a module other places for children."""
    module._modules = children


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The places for parameters in a module itself, by name, with None where a place is empty."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The places for buffers in a module itself, by name, with None where a place is empty."""
    return module._buffers


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a state dict holds of a module itself: its parameters and persistent buffers."""
    unsaved = module._non_persistent_buffers_set
    tensors = {**module._parameters, **module._buffers}
    return {k: v for k, v in tensors.items() if v is not None and k not in unsaved}


def forward_hooks(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The hooks that a module's calls run, each after its kind: `forward hook`, `forward pre hook`."""
    for kind in _FORWARD_HOOKS:
        for hook in getattr(module, kind).values():
            yield kind.strip("_").replace("_", " ").removesuffix("s"), hook


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a module's calls run hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module's calls, or their backward passes, run hooks."""
    return any(vars(module)[kind] for kind in _CALL_HOOKS)


def all_hooks(module: nn.Module) -> list[Any]:
    """The hooks of a module's calls and of its state dict, as they were registered."""
    kinds = (*_FORWARD_HOOKS, *_STATE_HOOKS)
    hooks = [hook for kind in kinds for hook in getattr(module, kind, {}).values()]
    return [getattr(hook, "hook", hook) for hook in hooks]  # torch wraps some


def copy_forward_hooks_(old: nn.Module, new: nn.Module) -> None:
    """Give a new module the hooks that the calls of an old one run."""
    for kind in _FORWARD_HOOKS:
        for name in (kind, f"{kind}_with_kwargs", f"{kind}_always_called"):
            if name in vars(old):
                setattr(new, name, vars(old)[name].copy())


def has_global_forward_hooks() -> bool:
    """Whether torch runs hooks at the calls of every module there is."""
    return bool(
        modules_of_torch._global_forward_hooks or modules_of_torch._global_forward_pre_hooks
    )


def wrapped_by_compile(model: nn.Module) -> nn.Module | None:
    """The module inside what `torch.compile` returned; None for any other module."""
    inside = vars(model).get("_modules", {}).get("_orig_mod")
    return inside if isinstance(inside, nn.Module) else None


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` wrapped a model, or `Module.compile` compiled a module of it."""
    if wrapped_by_compile(model) is not None:
        return True
    return any(getattr(module, "_compiled_call_impl", None) for module in model.modules())


def is_layer_of_torch(kind: type) -> bool:
    """Whether a class is one of the modules in `torch.nn`."""
    return kind.__module__.startswith("torch.nn.modules.")


def times_written(tensor: Tensor) -> int:
    """How often torch has written into a tensor's memory; 0 for those of inference mode, which do not
    count it."""
    return 0 if tensor.is_inference() else tensor._version
