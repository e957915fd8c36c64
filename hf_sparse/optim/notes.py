"""What the model card tells of training: an optimizer's step, recorded when it begins to train.

A `Sparsifier` that follows the optimizer knows more, and records its own description instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.optim.parameters import sparse_groups
from hf_sparse.provenance.optimizers import learning_rate, settings_of
from hf_sparse.provenance.record import is_told, record_optimizer_
from hf_sparse.provenance.values import Step


def note_fine_tuning_(optimizer: Optimizer, model: nn.Module | None = None) -> None:
    """Note that an optimizer trains a sparse model with its zeros frozen.

    Args:
        optimizer: the optimizer.
        model: the model that it trains. None: the one that `sparse_param_groups` got, if any.
    """
    _note_when_it_steps_(optimizer, model, lambda: fine_tuning(optimizer))


def note_shrinking_(optimizer: Optimizer, model: nn.Module, config: SparsityConfig) -> None:
    """Note that an optimizer shrinks weights, with the settings of the first step that does."""

    def step() -> Step | None:
        options = {**shrinking(optimizer, "lam"), "lr": learning_rate(sparse_groups(optimizer)[0])}
        return Step.of(type(optimizer).__name__, options, config) if options["lam"] else None

    _note_when_it_steps_(optimizer, model, step)


def fine_tuning(optimizer: Optimizer, **more: Any) -> Step:
    """The step of fine-tuning with frozen zeros.

    Args:
        optimizer: the optimizer.
        **more: what else is known: `seed`, and options.
    """
    options = {**settings_of(optimizer), **more}
    seed = options.pop("seed", None)
    return Step.of("fine-tuning with frozen zeros", options, seed=seed)


def shrinking(optimizer: Optimizer, *names: str) -> Mapping[str, Any]:
    """The settings of an optimizer's shrinkage: penalty, scale, and those named."""
    group = sparse_groups(optimizer)[0]
    return {name: group[name] for name in ("penalty", "scale", *names)}


def _note_when_it_steps_(
    optimizer: Optimizer, model: nn.Module | None, describe: Callable[[], Step | None]
) -> None:
    trained = None if model is None else weakref.ref(model)  # an optimizer keeps no model alive
    noted = False

    def note(*_: Any) -> None:
        nonlocal noted
        if noted or (step := describe()) is None:
            return
        noted = True
        model = None if trained is None else trained()
        if not is_told(optimizer, model):
            record_optimizer_(optimizer, step, model)

    optimizer.register_step_post_hook(note)
