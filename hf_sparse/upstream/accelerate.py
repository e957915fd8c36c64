"""What accelerate puts on the modules of a model that is on several devices, or on the disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "expecting_weights_on_disk",
    "fetch_weights_from_",
    "files_of",
    "has_hooks",
    "hook_of",
    "moves_inputs_alone",
    "read_through_",
]


Wrapped = TypeVar("Wrapped", bound=Mapping[str, Tensor])


class Weights(Protocol):
    """Weights by their names in a model."""

    def __getitem__(self, name: str) -> Tensor: ...


def hook_of(module: nn.Module) -> Any:
    """The hook that accelerate put on a module, or None."""
    return vars(module).get("_hf_hook")


def has_hooks(model: nn.Module) -> bool:
    """Whether accelerate put a hook on any module of a model."""
    return any(hook_of(module) is not None for module in model.modules())


def moves_inputs_alone(module: nn.Module) -> bool:
    """Whether all that accelerate's hook does in a module is to move its inputs to the CPU."""
    hook, forward = hook_of(module), vars(module).get("_old_forward")
    if type(hook).__name__ != "AlignDevicesHook" or getattr(hook, "offload", True):
        return False
    device: Any = getattr(hook, "execution_device", None)
    here = device is None or (not isinstance(device, int) and torch.device(device).type == "cpu")
    return here and getattr(forward, "__func__", None) is type(module).forward


def read_through_(model: nn.Module, wrap: Callable[[Mapping[str, Tensor]], Wrapped]) -> Wrapped:
    """Let a model on the disk read its weights through something else.

    Args:
        model: whose modules have hooks that bring their weights in for each call.
        wrap: given the weights on the disk by their names in the model, makes what is read instead.

    Returns:
        What `wrap` made.
    """
    maps = [
        part.weights_map
        for module in model.modules()
        for part in getattr(hook_of(module), "hooks", [hook_of(module)])
        if getattr(part, "weights_map", None) is not None
    ]
    wrapped = wrap(maps[0].dataset)
    for weights_map in maps:
        weights_map.dataset = wrapped
    return wrapped


def files_of(weights: Any) -> set[Path]:
    """The safetensors files that weights on the disk, as `read_through_` gives them, are read from."""
    return {Path(place["safetensors_file"]) for place in weights.index.values()}


def fetch_weights_from_(model: nn.Module, weights: Weights) -> None:
    """Let the weights of a model on the meta device be those of another place, as if on a disk."""
    vars(model)["_hf_hook"] = SimpleNamespace(weights_map=weights)


@contextmanager
def expecting_weights_on_disk() -> Iterator[None]:
    """Keep back accelerate's warning that weights stay on the disk, where that is what is wanted."""

    def other(record: logging.LogRecord) -> bool:
        return "offloaded to the disk" not in record.getMessage()

    logger = logging.getLogger("accelerate.big_modeling")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
