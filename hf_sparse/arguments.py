"""What is given to a call where a model or a folder is wanted."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from hf_sparse.suggestions import shortened


def check_model(model: Any, call: str, wanted: type[nn.Module] = nn.Module) -> None:
    """Refuse what is no model: a folder's name, a class, a pipeline, something that wraps a model.

    Args:
        model: what was given.
        call: the name of the call, for the error.
        wanted: `nn.Module`, or `PreTrainedModel` where plain modules will not do.

    Raises:
        ValueError: what was found, what was wanted, and how to get it.
    """
    if isinstance(model, wanted):
        return
    kind = "a model" if wanted is nn.Module else "a transformers model"
    start = f"{call} takes {kind}, not "
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        raise ValueError(
            f"{start}a {type(model).__name__}: load it first, as "
            f"AutoModelForCausalLM.from_pretrained({name!r}) or another Auto class does."
        )
    if isinstance(model, type):
        raise ValueError(
            f"{start}the class {model.__name__}: make one, {model.__name__}.from_pretrained(...)."
        )
    if isinstance(getattr(model, "model", None), nn.Module) and not isinstance(model, nn.Module):
        raise ValueError(f"{start}a {type(model).__name__}: give its model, .model.")
    if isinstance(model, nn.Module):
        raise ValueError(
            f"{start}a {type(model).__name__}. Give the model inside a wrapper: "
            "accelerator.unwrap_model(model), model.module; of a PEFT model merge the adapters first, "
            "hf_sparse.merge_adapters(model)."
        )
    raise ValueError(f"{start}a {type(model).__name__}: {shortened(model)}.")


def check_optimizer(optimizer: Any, call: str) -> None:
    """Refuse what is no torch optimizer, such as the model that it trains.

    Raises:
        ValueError: what was found, and what was wanted.
    """
    if not hasattr(optimizer, "param_groups"):
        raise ValueError(
            f"{call} takes a torch optimizer, not a {type(optimizer).__name__}: make one with "
            "hf_sparse.sparse_param_groups(model, config)."
        )


def check_gradients(call: str) -> None:
    """Refuse to train where torch records no gradients.

    Raises:
        ValueError: the call stands inside `torch.no_grad()` or `torch.inference_mode()`.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise ValueError(
            f"{call} trains, and gradients are switched off here: call it outside of "
            "torch.no_grad() and torch.inference_mode()."
        )


def check_path(path: Any, call: str, what: str = "folder") -> None:
    """Refuse what names no place on the disk, such as a model in the place of its folder.

    Raises:
        ValueError: what was found.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(
            f"{call}: {what} is a {type(path).__name__}; wanted the name of a {what} (a text or a "
            "Path)."
        )
