"""Classes of PEFT, told by their names: PEFT is optional, and is not imported to tell."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["has_adapters", "is_of_peft", "is_peft_model"]


def is_of_peft(item: Any) -> bool:
    """Whether the class of something is PEFT's, or made from one of PEFT's."""
    return any(base.__module__.startswith("peft.") for base in type(item).__mro__)


def is_peft_model(model: Any) -> bool:
    """Whether this is a `peft.PeftModel`."""
    return _is_a(model, "PeftModel")


def has_adapters(model: nn.Module) -> bool:
    """Whether layers of a model are wrapped by PEFT."""
    return any(_is_a(module, "BaseTunerLayer") for module in model.modules())


def _is_a(item: Any, name: str) -> bool:
    return any(
        base.__name__ == name and base.__module__.startswith("peft.") for base in type(item).__mro__
    )
