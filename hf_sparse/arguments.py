"""What is given to a public call: models, folders, and values of the kinds that it names."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.suggestions import shortened
from hf_sparse.upstream.accelerate import has_hooks

# An option's bound: whether a value is inside, and how an error says so.
Bound = tuple[Callable[[Any], bool], str]


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
            "hf_sparse.merge_adapters_(model)."
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


def check_gradients(model: nn.Module, call: str) -> None:
    """Refuse to train where torch records no gradients.

    Raises:
        ValueError: the call stands inside `torch.no_grad()` or `torch.inference_mode()`, or the
            model was made inside of the latter.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise ValueError(
            f"{call} trains, and gradients are switched off here: call it outside of "
            "torch.no_grad() and torch.inference_mode()."
        )
    check_not_inference(model, call)


def check_not_inference(model: nn.Module, call: str) -> None:
    """Refuse a model that was made inside `torch.inference_mode()`: it can never be trained.

    Raises:
        ValueError: the first such weight.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"{call} takes gradients, and {name} was made inside torch.inference_mode(), so that "
                "it has none. Load the model outside of it (torch.no_grad() is fine)."
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


def check_has_values(model: nn.Module, call: str, *, offloaded: bool = False) -> None:
    """Refuse a model with weights on the meta device, which have shapes and no values.

    Args:
        model: what was given.
        call: the name of the call, for the error.
        offloaded: whether the call can work with weights that Accelerate fetches from the disk.

    Raises:
        ValueError: the first such weight, and how to load it.
    """
    if offloaded and has_hooks(model):
        return
    for name, parameter in model.named_parameters():
        check_has_value(name, parameter, call)


def check_has_value(name: str, tensor: Tensor, call: str, instead: str = "") -> None:
    """Refuse a tensor on the meta device.

    Args:
        name: of the tensor.
        tensor: what was given.
        call: the name of the call, for the error.
        instead: another way out, for the end of the error.

    Raises:
        ValueError: its name, and how to load the model.
    """
    if tensor.device.type == "meta":
        raise ValueError(
            f"{call}: {name} is on the meta device, it has no values: the model was never loaded, "
            "or device_map left the weight on the disk. Load the whole model into memory: "
            f"from_pretrained without device_map.{instead}"
        )


def check_saves(tokenizer: Any, call: str) -> None:
    """Refuse what cannot be saved as a tokenizer beside a model, such as the tokenizer's name.

    Raises:
        ValueError: what was found, and how to load a tokenizer.
    """
    saves = callable(getattr(tokenizer, "save_pretrained", None))
    if tokenizer is not None and (not saves or isinstance(tokenizer, nn.Module | type)):
        raise ValueError(
            f"{call}: tokenizer is {shortened(tokenizer)}; wanted a tokenizer or a processor, as "
            "AutoTokenizer.from_pretrained loads one, or None."
        )


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return isinstance(value, Integral) or not math.isnan(value)


def _are_named(value: Any, kind: str) -> bool:
    """Whether this is a sequence of values of the class of this name."""
    return _is_sequence(value) and all(_is_named(item, kind) for item in value)


def _is_named(value: Any, kind: str) -> bool:
    return any(base.__name__ == kind for base in type(value).__mro__)


# The annotations that are checked: whether a value is of that kind, and how an error says so.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "None": (lambda value: value is None, "None"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "int": (lambda value: _is_number(value) and isinstance(value, Integral), "a whole number"),
    "float": (_is_number, "a number"),
    "str": (lambda value: isinstance(value, str), "a text"),
    "Path": (lambda value: isinstance(value, os.PathLike), "a Path"),
    "os.PathLike[str]": (lambda value: isinstance(value, os.PathLike), "a Path"),
    "torch.dtype": (lambda value: isinstance(value, torch.dtype), "a torch.dtype"),
    "Sequence[str]": (lambda value: _are_named(value, "str"), "a list of texts"),
    "Sequence[float]": (
        lambda value: _is_sequence(value) and all(map(_is_number, value)),
        "a list of numbers",
    ),
    "Sequence[Metric]": (
        lambda value: _are_named(value, "Metric"),
        "a list of hf_sparse.Metric, as [Metric(name, sparse, dense)]",
    ),
    "Mapping[str, Any]": (lambda value: isinstance(value, Mapping), "a dict"),
    "Mapping[str, Tensor]": (
        lambda value: (
            isinstance(value, Mapping)
            and all(isinstance(tensor, Tensor) for tensor in value.values())
        ),
        "a dict of tensors",
    ),
    "SparsityReport": (
        lambda value: _is_named(value, "SparsityReport") or _is_named(value, "ShrinkReport"),
        "a SparsityReport, as prune_ returns it,",
    ),
    "Schedule": (lambda value: _is_named(value, "Schedule"), "a Schedule"),
}


def check_kinds(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Compare what a call was given with the annotations of its parameters.

    Annotations with parts that are not in `_KINDS`, such as models and optimizers, are left to other
    checks; so are bounds of numbers.

    Args:
        function: the call, or the class that is made.
        values: by the names of its parameters, such as `locals()` at its start; other names are
            passed over.

    Raises:
        ValueError: the call, the parameter, what was found, and what was wanted.
    """
    call = function.__qualname__
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in values or parameter.kind is parameter.VAR_KEYWORD:
            continue
        kinds = str(parameter.annotation).split(" | ")
        if not all(kind in _KINDS for kind in kinds):
            continue
        value = values[name]
        if any(_KINDS[kind][0](value) for kind in kinds):
            continue
        texts = list(dict.fromkeys(_KINDS[kind][1] for kind in kinds))
        wanted = " or ".join([", ".join(texts[:-1]), texts[-1]] if texts[1:] else texts)
        raise ValueError(
            f"{call}: {name} is {shortened(value)}; wanted {wanted}.{_meant(value, kinds)}"
        )


def arguments_for(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a call hands on: those that another one takes by keyword, under one name.

    Args:
        function: the other call.
        values: the arguments of the first, by name, such as `locals()` at its start.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    return {name: values[name] for name in names if name in values}


def _meant(value: Any, kinds: Sequence[str]) -> str:
    """A question after an error: the number in a text, or the list of one value."""
    if isinstance(value, str) and {"int", "float"} & set(kinds):
        kind = float if "float" in kinds else int
        try:
            number = kind(value)
        except ValueError:
            return ""
        return f" Did you mean {number!r}?" if math.isfinite(number) else ""
    if isinstance(value, str) and "Sequence[str]" in kinds:
        return f" Did you mean {[value]!r}?"
    return ""


def is_finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN."""
    if values.is_floating_point() and values.element_size() == 1:
        values = values.float()  # fp8 cannot tell
    if not values.is_floating_point() or type(values) not in (Tensor, nn.Parameter):
        return bool(torch.isfinite(values).all())  # shards, too
    # Read once, without a copy.
    return not values.numel() or all(bool(edge.isfinite()) for edge in values.aminmax())


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise a ValueError that names the tensor if it holds NaN or infinity."""
    if not is_finite(tensor):
        whole = tensor.float() if tensor.element_size() == 1 else tensor
        bad = int((~torch.isfinite(whole)).sum())
        raise ValueError(
            f"{name} has {bad} values that are NaN or infinite; wanted finite ones. The model or its "
            "dtype is damaged, or its training diverged: load it again (float16 as float32)."
        )
