"""What transformers builds from a config, without values, and how two such models are compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_sparse.upstream.transformers.models import build

# What building raises for a config that transformers knows no model for.
BUILD_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError),
    *(StrictDataclassError, TypeError, ValueError),
)
_SCALARS = (bool, int, float, str, type(None))

# Of a module: its class and the shapes of its tensors, by name; its values.
Described = tuple[dict[str, Any], dict[str, Any]]


def built(model: PreTrainedModel, config: Any) -> nn.Module:
    """A model of the same class without values."""
    with torch.device("meta"):
        found: nn.Module = build(type(model), config)
    return found


def described(module: nn.Module, skip: str | None = None) -> Iterator[tuple[str, Described]]:
    """For each module in a module, by its path: its class and the shapes of its tensors; its values.

    Args:
        module: the module.
        skip: a path that is left out, with all that is below it.
    """
    for path, part in module.named_modules():
        if skip is not None and f"{path}.".startswith(f"{skip}."):
            continue
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
        values = {
            name: value
            for name, value in vars(part).items()
            if not name.startswith("_") and name != "training" and type(value) in _SCALARS
        }
        yield path, ({"": type(part).__qualname__, **shapes}, values)


def configs_in(config: Any) -> Iterator[Any]:
    """A config and those of the model's parts inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs_in(value)


def own_configs(model: nn.Module) -> list[Any]:
    """The configs that a model and its modules hold, each once."""
    held = [getattr(module, "config", None) for module in model.modules()]
    found = [part for config in held if config is not None for part in configs_in(config)]
    return list({id(config): config for config in found}.values())
