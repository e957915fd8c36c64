"""The layers of PEFT. Importing this module imports PEFT, which is optional."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.shira.layer import ShiraLayer
from peft.tuners.shira.mask_functions import random_mask
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

__all__ = [
    "BaseTunerLayer",
    "LoraLinear",
    "LoraVariant",
    "ShiraLayer",
    "adapters_of",
    "is_target",
    "random_mask",
    "trained_whole",
    "use_layers_",
    "wrapped_whole",
]


def adapters_of(layer: Any) -> set[str]:
    """The names of the adapters that a layer of PEFT has."""
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part, {})}


def is_target(config: Any, name: str) -> bool:
    """Whether the settings of an adapter mean the module of this name."""
    return bool(check_target_module_exists(config, name))


def use_layers_(config: Any, layers: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Let an adapter be made of these layers, in place of PEFT's, for each class of base layers."""
    config._register_custom_module(dict(layers))


def wrapped_whole(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules of a model that PEFT keeps beside a copy that it trains: whole, or single tokens.

    Each is named, and its `original_module` is what the model had there before.
    """
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    ]


def trained_whole(model: nn.Module) -> list[tuple[str, Any]]:
    """Those of `wrapped_whole` of which all weights are trained: the settings' `modules_to_save`."""
    return [
        (name, module)
        for name, module in wrapped_whole(model)
        if isinstance(module, ModulesToSaveWrapper)
    ]
