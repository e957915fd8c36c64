"""The functions by which transformers computes attention, its masks, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["attention_function", "experts_function", "mask_function", "register_mask"]


def attention_function(name: str | None) -> Any:
    """The function of attention that has this name; None if there is none."""
    return ALL_ATTENTION_FUNCTIONS.get(name)


def experts_function(name: str | None) -> Any:
    """The function of a mixture's experts that has this name; None if there is none."""
    return ALL_EXPERTS_FUNCTIONS.get(name)


def mask_function(name: str | None) -> Any:
    """The function that makes the masks for the attention of this name; None if there is none."""
    return ALL_MASK_ATTENTION_FUNCTIONS.get(name)


def register_mask(name: str, function: Callable[..., Any]) -> None:
    """Let a function make the masks for the attention of this name."""
    AttentionMaskInterface.register(name, function)
