"""Generation: the steps of transformers' `generate` that have no public name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

__all__ = [
    "generates_as_usual",
    "merged_config",
    "padding_token",
    "prefill",
    "sample",
    "takes_one_token_after_the_other",
]

# What the loop calls on a model: where its class, or itself, has another one, that one is to be called.
_STEPS = (
    "prepare_inputs_for_generation",
    "_prefill",
    "_sample",
    "_update_model_kwargs_for_generation",
)
_PLAIN_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def merged_config(model: Any, given: Any, options: Mapping[str, Any]) -> Any:
    """The settings of a call of `generate`: its options, then its config's, then the model's."""
    config = copy.copy(model.generation_config if given is None else given)
    for name, value in vars(model.generation_config).items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    for name in options:
        if hasattr(config, name):
            setattr(config, name, options[name])
    return config


def generates_as_usual(model: Any) -> bool:
    """Whether a model's loop and its forward are transformers' own, without changes for its family."""
    usual = all(
        getattr(type(model), name, None) is getattr(GenerationMixin, name, None)
        and name not in vars(model)
        for name in _STEPS
    )
    return usual and type(model).forward.__module__.startswith("transformers.")


def takes_one_token_after_the_other(config: Any, assistant: Any) -> bool:
    """Whether a generation config asks for greedy search or sampling, without beams and assistants."""
    return config.get_generation_mode(assistant) in _PLAIN_MODES


def prefill(model: Any, input_ids: Tensor, config: Any, given: dict[str, Any]) -> Any:
    """The model's outputs for the prompt, as `generate` computes them before its loop."""
    first = not getattr(config, "is_assistant", False)
    return model._prefill(input_ids, config, given, is_first_iteration=first)


def sample(model: Any, input_ids: Tensor, given: Mapping[str, Any]) -> Any:
    """Transformers' own loop for greedy search and sampling."""
    return type(model)._sample(model, input_ids, **given)


def padding_token(config: Any) -> Tensor | None:
    """The token behind the end of a sequence, as `generate` has prepared it."""
    token: Tensor | None = getattr(config, "_pad_token_tensor", None)
    return None if token is None else token.to(torch.long)
