"""One way to switch a model's modes for a while: how it runs, what it returns, what it learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def switched(
    model: nn.Module,
    *,
    training: bool | None = None,
    trained: Sequence[nn.Parameter] | None = None,
    checkpointing: bool = False,
    **settings: Any,
) -> Iterator[None]:
    """Switch modes of a model, and switch every one of them back on every exit.

    Whatever else switches the modes of modules inside is undone, too: a `model.train()`.

    Args:
        model: the model, or a block of one.
        training: True for the training mode of all modules, False for their eval mode. None leaves
            each module in its own.
        trained: parameters that get gradients, under `torch.enable_grad`; no others of the model do.
            The gradients that were there are put aside. None changes nothing about gradients.
        checkpointing: compute activations twice instead of keeping them. This works in training mode
            alone, so that all modules are in it but Dropout.
        **settings: values for the configs of the model and of its modules, such as
            `use_cache=False`. A setting that a config does not have, or that is None there, stays.
    """
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        if training is not None:
            model.train(training)
        _set(model, settings, undo)
        if checkpointing:
            _checkpoint(model, undo)
        if trained is not None:
            _train(model, trained, undo)
        yield


def _set(model: nn.Module, settings: dict[str, Any], undo: ExitStack) -> None:
    """Set values in all configs of a model; modules may share one."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    for config in {id(config): config for config in configs}.values():
        for name, wanted in settings.items():
            known = getattr(config, name, None)
            if known is not None and known != wanted:
                undo.callback(setattr, config, name, known)
                setattr(config, name, wanted)


def _checkpoint(model: Any, undo: ExitStack) -> None:
    if not model.is_gradient_checkpointing:
        undo.callback(model.gradient_checkpointing_disable)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        module.training = not isinstance(module, nn.Dropout)


def _train(model: nn.Module, trained: Sequence[nn.Parameter], undo: ExitStack) -> None:
    chosen = set(map(id, trained))
    for parameter in model.parameters():
        undo.callback(setattr, parameter, "grad", parameter.grad)
        undo.callback(parameter.requires_grad_, parameter.requires_grad)
        parameter.grad = None
        parameter.requires_grad_(id(parameter) in chosen)
    undo.enter_context(torch.enable_grad())
