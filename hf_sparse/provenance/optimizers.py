"""Which optimizer trains a model: adapters and teachers do not see it, and their cards tell of it.

One hook on all optimizers of torch, set when the first such model is watched. At the first step of
an optimizer it looks whether the optimizer has parameters of a watched model.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hf_sparse.provenance.values import Pairs, pairs
from hf_sparse.upstream.torch import register_optimizer_step_post_hook

# The attribute of a model: for the names of its parameters, and for "", the settings of the last
# optimizer that trained them.
_TRAINED_BY = "_hf_sparse_trained_by"
# The attribute of an optimizer: how many models had been watched when it was looked at.
_LOOKED_AT = "_hf_sparse_looked_at"
_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_count = 0


def notice_optimizer_(model: nn.Module) -> None:
    """Let a model remember which optimizer trains it from now on."""
    global _count
    if not _count:
        register_optimizer_step_post_hook(_look)
    _count += 1
    _WATCHED.add(model)
    known = vars(model).get(_TRAINED_BY, {})
    vars(model)[_TRAINED_BY] = {name: told for name, told in known.items() if name}


def optimizer_of(model: nn.Module, part: str | None = None) -> Pairs:
    """The class and learning rate of the last optimizer that trained a model; empty if none did.

    Args:
        model: a model; what was before the last `notice_optimizer_` counts for its parts alone.
        part: of parameters with this word in their dotted names, such as the name of an adapter.
    """
    trained: dict[str, Pairs] = vars(model).get(_TRAINED_BY, {})
    if part is None:
        return trained.get("", ())
    return next((told for name, told in trained.items() if part in name.split(".")), ())


def settings_of(optimizer: Optimizer) -> dict[str, Any]:
    """The class and the learning rate, before a scheduler changed it."""
    return {"optimizer": type(optimizer).__name__, "lr": learning_rate(optimizer.param_groups[0])}


def learning_rate(group: dict[str, Any]) -> Any:
    """The learning rate of a param group, before a scheduler changed it."""
    rate = group.get("initial_lr", group.get("lr"))
    return float(rate) if isinstance(rate, Tensor) else rate


def _look(optimizer: Optimizer, *_: Any) -> None:
    if vars(optimizer).get(_LOOKED_AT) == _count:
        return
    vars(optimizer)[_LOOKED_AT] = _count
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in list(_WATCHED):
        names = [name for name, own in model.named_parameters() if id(own) in trained]
        if names:
            told = pairs(settings_of(optimizer))
            known = vars(model).get(_TRAINED_BY, {})
            vars(model)[_TRAINED_BY] = {**known, **dict.fromkeys(["", *names], told)}
