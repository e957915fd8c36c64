"""Copies of models that share the tensors, with other modules in place of some."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from hf_sparse.upstream.torch import all_hooks

Model = TypeVar("Model", bound=nn.Module)


def with_modules(model: Model, replaced: Mapping[nn.Module, nn.Module]) -> Model:
    """A copy of a model that shares its tensors and has other modules in place of some.

    A module that is there several times is replaced at all places. Hooks act in the copy as they do
    in the model: what they were made with, such as a list that collects outputs, is not copied.
    """
    memo: dict[int, Any] = {id(old): new for old, new in replaced.items()}
    inside = {id(tensor) for old in replaced for tensor in [*old.parameters(), *old.buffers()]}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    modules = {id(module) for module in model.modules()}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor):  # computed from parameters, by a hook
                memo[id(value)] = value.detach()
        for hook in all_hooks(module):
            owner = getattr(hook, "__self__", hook)
            known = [owner, *owner.args] if isinstance(owner, functools.partial) else [owner]
            if not any(id(one) in modules for one in known):
                memo[id(owner)] = owner  # else a module's own method becomes that of its copy
    return copy.deepcopy(model, memo)
