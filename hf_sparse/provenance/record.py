"""What is known of a model in memory, and how all that change it add their step."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from hf_sparse.formats.error import FormatError
from hf_sparse.provenance.entry import ENTRY, from_dict
from hf_sparse.provenance.optimizers import notice_optimizer_, optimizer_of
from hf_sparse.provenance.values import Provenance, Step, Teaching, pairs
from hf_sparse.upstream.peft_by_name import is_peft_model
from hf_sparse.upstream.torch import wrapped_by_compile

# The attribute of a model that holds its Provenance.
_PROVENANCE = "_hf_sparse_provenance"
# The attribute of an optimizer that holds the step of its training.
_STEP = "_hf_sparse_step"
# The models whose weights were sorted for a sparse optimizer: optimizers do not know their models.
_IN_TRAINING: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def provenance_of(model: nn.Module) -> Provenance:
    """The provenance of a model, or else that in the config which it was loaded with."""
    model = _inside(model)
    if _PROVENANCE not in vars(model):
        remember_(model, read_entry(getattr(getattr(model, "config", None), ENTRY, None)))
    known: Provenance = vars(model)[_PROVENANCE]
    return known


def remember_(model: nn.Module, provenance: Provenance) -> None:
    """Let a model know where it comes from, instead of what it knew."""
    vars(_inside(model))[_PROVENANCE] = provenance


def read_entry(entry: Any) -> Provenance:
    """The provenance that an entry of `config.json` tells.

    Nothing that is computed depends on it: a damaged one is dropped, with a warning.
    """
    if entry is None:
        return Provenance()
    try:
        return from_dict(entry)
    except FormatError as error:
        warnings.warn(
            f"config.json: {ENTRY} is damaged, or of a newer hf_sparse ({error}). What was done to the "
            "model is not known; its weights are not concerned.",
            stacklevel=4,
        )
        return Provenance()


def record_(model: nn.Module, step: Step) -> None:
    """Add a step to what is known of a model."""
    remember_(model, provenance_of(model).after(step))


def record_training_(model: nn.Module, step: Step, instead_of: Step | None = None) -> Step:
    """Add a step of training, with the teacher that a `Distillation` has announced.

    Args:
        model: the model.
        step: the step.
        instead_of: an earlier description of the same training, which this one replaces.

    Returns:
        The step as it is recorded.
    """
    known = provenance_of(model)
    teaching = known.teaching
    taught = () if instead_of is None else instead_of.distillation
    if teaching is not None and not teaching.ended:
        taught, teaching = teaching.settings, replace(teaching, told=True)
    step = replace(step, distillation=taught)
    remember_(model, replace(known.after(step, instead_of), teaching=teaching))
    return step


def record_merge_(model: nn.Module, steps: Iterable[Step]) -> None:
    """Add the steps of merging adapters, with the teacher that they were trained by."""
    known = provenance_of(model)
    teaching = known.teaching
    if teaching is None or not teaching.of_adapters:
        for step in steps:
            record_(model, step)
        return
    for step in steps:
        known = known.after(replace(step, distillation=teaching.settings))
    teaching = None if teaching.ended else Teaching(teaching.settings)
    remember_(model, replace(known, teaching=teaching))


def announce_teaching_(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Announce a teacher: the steps of training that are recorded from now on tell its settings."""
    remember_(model, replace(provenance_of(model), teaching=Teaching(pairs(settings))))
    notice_optimizer_(_inside(model))


def note_taught_(model: nn.Module, has_adapters: Callable[[nn.Module], bool]) -> None:
    """Note that a model is trained with the announced teacher; called in every forward pass."""
    known = provenance_of(model)
    if known.teaching is not None and not known.teaching.ran:
        teaching = replace(known.teaching, ran=True, of_adapters=has_adapters(model))
        remember_(model, replace(known, teaching=teaching))


def end_teaching_(model: nn.Module) -> None:
    """Tell of the announced teacher, if no step of training did, and forget it.

    Adapters that were trained by it tell of it when they are merged.
    """
    known = with_teaching_told(model)
    teaching = known.teaching
    if teaching is not None:
        pending = teaching.of_adapters and teaching.ran
        teaching = replace(teaching, ended=True) if pending else None
    remember_(model, replace(known, teaching=teaching))


def forget_teaching_(model: nn.Module) -> None:
    """Forget the announced teacher, which the caller records."""
    remember_(model, replace(provenance_of(model), teaching=None))


def with_teaching_told(model: nn.Module) -> Provenance:
    """The provenance of a model, with a step for a teacher that no step of training names."""
    return provenance_of(model).with_teaching_told(optimizer_of(_inside(model)))


def watch_(model: nn.Module) -> None:
    """Remember a model whose parameters an optimizer gets, so that `record_optimizer_` finds it."""
    _IN_TRAINING.add(_inside(model))


def record_optimizer_(optimizer: Optimizer, step: Step, model: nn.Module | None = None) -> None:
    """Record what an optimizer does to its model. It replaces what was last recorded of that optimizer.

    Args:
        optimizer: one of torch.
        step: what it does.
        model: the model that it trains. None: the model of `watch_` that has its parameters, if any.
    """
    model = _model_of(optimizer) if model is None else model
    if model is not None:
        vars(optimizer)[_STEP] = record_training_(model, step, vars(optimizer).get(_STEP))


def is_told(optimizer: Optimizer, model: nn.Module | None = None) -> bool:
    """Whether the last step that a model remembers is that of this optimizer."""
    model = _model_of(optimizer) if model is None else model
    steps = () if model is None else provenance_of(model).steps
    return bool(steps) and steps[-1] == vars(optimizer).get(_STEP)


def _model_of(optimizer: Optimizer) -> nn.Module | None:
    parameter = optimizer.param_groups[0]["params"][0]
    for model in _IN_TRAINING:
        if any(own is parameter for own in model.parameters()):
            return model
    return None


def _inside(model: nn.Module) -> nn.Module:
    """The model inside of wrappers: DDP's, torch.compile's, and PEFT's."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif (inner := wrapped_by_compile(model)) is not None:
            model = inner
        elif is_peft_model(model):
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model
