"""What transformers keeps on models, their modules and configs; no model code is imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ATTENTION_SETTING",
    "EXPERTS_SETTING",
    "KEPT_ON_MODULES",
    "PUT_BY_DECORATORS",
    "attention_of",
    "block_class",
    "build",
    "collects_outputs",
    "dtype_plan",
    "forget_output_hooks_",
    "has_own_adapters",
    "import_modeling",
    "is_from_transformers",
    "modeling_name",
    "not_expected_in_files",
    "not_required_in_files",
    "not_saved",
    "quantized_by",
    "set_attention_",
    "tells_outputs",
    "tied_names",
]

# The setting of a config that names the function of attention.
ATTENTION_SETTING = "_attn_implementation"
# The setting of a config that names the function of a mixture's experts.
EXPERTS_SETTING = "_experts_implementation"
# Functions of its own that transformers' decorators put on classes, by the names that they have there.
PUT_BY_DECORATORS = {"_apply_gate": ("transformers.integrations.moe", "_default_apply_gate")}
# Attributes that transformers puts on modules, and that change no output of a model in eval mode.
KEPT_ON_MODULES = ("_gradient_checkpointing_func", "_is_hf_initialized")


def build(model_class: Any, config: Any, attention: str = "eager") -> Any:
    """A model of a class from a config, with the attention that is written in torch alone."""
    return model_class._from_config(config, attn_implementation=attention)


def has_own_adapters(model: Any) -> bool:
    """Whether adapters were added by the model's own `add_adapter` or `load_adapter`."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def quantized_by(model: Any) -> str | None:
    """The method by which a model is quantized, such as `gptq`; `?` if it has no name, or None."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return None
    settings = getattr(quantizer, "quantization_config", None)
    method = getattr(settings, "quant_method", "?")
    return str(getattr(method, "value", method))


def tied_names(model: Any) -> Mapping[str, str]:
    """For each tied weight of a model, by name, the name of the weight that it is."""
    tied: Mapping[str, str] | None = getattr(model, "all_tied_weights_keys", None)
    return tied or {}


def not_required_in_files(model: PreTrainedModel) -> list[str]:
    """Regular expressions for the names of weights that a checkpoint need not have."""
    return [*(model._keys_to_ignore_on_load_missing or ()), *not_saved(model)]


def not_expected_in_files(model: PreTrainedModel) -> list[str]:
    """Regular expressions for the names of what a checkpoint may have too much."""
    return list(model._keys_to_ignore_on_load_unexpected or ())


def not_saved(model: PreTrainedModel) -> list[str]:
    """The names of weights that are left out when the model is saved."""
    return list(model._keys_to_ignore_on_save or ())


def dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> Mapping[str, torch.dtype]:
    """The types of the weights whose names match a pattern, if the model is loaded in `dtype`."""
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)
    return plan


def attention_of(config: Any) -> str | None:
    """The name of the function that computes the attention of a config's model."""
    name: str | None = getattr(config, ATTENTION_SETTING, None)
    return name


def set_attention_(config: Any, name: str) -> None:
    """Let the function of this name compute the attention of a config's model."""
    setattr(config, ATTENTION_SETTING, name)


def tells_outputs(module: nn.Module) -> bool:
    """Whether transformers collects a module's outputs, hidden states among them, by its class."""
    return getattr(module, "_can_record_outputs", None) is not None


def block_class(base: Any, name: str | None = None) -> type[nn.Module]:
    """The class of a base model's blocks, by which transformers collects hidden states.

    Args:
        base: the model.
        name: of the class, where the model's own loop collects them, and tells nothing.
    """
    recorded: dict[str, Any] = getattr(base, "_can_record_outputs", None) or {}
    if name is None:
        told: Any = recorded["hidden_states"]
        of: type[nn.Module] = getattr(told, "target_class", told)
        return of
    modules = [sys.modules[kind.__module__] for kind in type(base).__mro__]
    found: type[nn.Module] = next(
        getattr(module, name) for module in modules if hasattr(module, name)
    )
    return found


def forget_output_hooks_(model: nn.Module) -> None:
    """Let transformers hook the modules of a model again when it next collects outputs."""
    for module in model.modules():
        vars(module).pop("_output_capturing_hooks_installed", None)


def collects_outputs(hook: Any) -> bool:
    """Whether a hook on a module is one of transformers' own, which collect outputs and change none."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def is_from_transformers(item: Any) -> bool:
    """Whether a function or class was written by transformers."""
    return str(getattr(item, "__module__", "")).startswith("transformers.")


def modeling_name(family: str) -> str:
    """The name of the module that has the model classes of a family."""
    return CONFIG_MAPPING[family].__module__.replace(".configuration_", ".modeling_")


def import_modeling(config_class: type) -> ModuleType:
    """The module that has the model classes for configs of this class."""
    return importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
