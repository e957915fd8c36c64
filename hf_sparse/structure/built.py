"""What transformers builds from a config, without values, and the configs that a model holds."""

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


def built(model: PreTrainedModel, config: Any) -> nn.Module:
    """A model of the same class without values."""
    with torch.device("meta"):
        found: nn.Module = build(type(model), config)
    return found


def configs_in(config: Any) -> Iterator[Any]:
    """A config and those of the model's parts inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs_in(value)


def own_configs(model: nn.Module) -> list[Any]:
    """The configs that a model and its modules hold, each once."""
    held = [getattr(module, "config", None) for module in model.modules()]
    configs = [part for config in held if config is not None for part in configs_in(config)]
    return list({id(config): config for config in configs}.values())
