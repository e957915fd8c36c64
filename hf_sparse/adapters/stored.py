"""An adapter on the disk or the Hub: its settings and weights, read and checked."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from torch import Tensor

from hf_sparse.adapters.expressions import is_fast_expression
from hf_sparse.upstream.transformers.files import ADAPTER_CONFIG_NAME

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def stored_config(
    folder: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
) -> dict[str, Any]:
    """The settings of a saved adapter, from where PEFT takes the weights.

    Raises:
        ValueError: they cannot be read, or one has a value that it cannot have.
        OSError: there are none, or no weights beside them.
    """
    file = Path(folder) / (subfolder or "") / ADAPTER_CONFIG_NAME
    if not file.exists() and not Path(folder).exists():
        file = Path(
            hf_hub_download(
                str(folder), ADAPTER_CONFIG_NAME, subfolder=subfolder, **_hub_options(kwargs)
            )
        )
    if not file.exists():
        raise FileNotFoundError(
            f"{folder} has no {ADAPTER_CONFIG_NAME}; wanted the folder of an adapter."
        )
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}. Save the adapter again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is no JSON object; wanted the settings of an adapter.")
    if Path(folder).exists() and not any((file.parent / name).exists() for name in _WEIGHTS):
        raise FileNotFoundError(f"{file.parent} has no {_WEIGHTS[0]}: the adapter's weights.")
    check_settings(values, str(file), "Correct it, or save the adapter again.")
    return values


def check_settings(values: dict[str, Any], place: str, way_out: str) -> None:
    """Refuse settings of an adapter with values that they cannot have.

    Args:
        values: as JSON holds them; sets and tuples are taken for lists.
        place: where they are from, for the error.
        way_out: what to do, for the error.

    Raises:
        ValueError: the setting, its value, and what was wanted.
    """
    for name, (allowed, wanted) in _SETTINGS.items():
        value = values.get(name)
        value = list(value) if isinstance(value, set | tuple) else value
        if name in values and not allowed(value):
            raise ValueError(f"{place} has {name}={value!r}; wanted {wanted}. {way_out}")


def stored_weights(folder: str | os.PathLike[str], **kwargs: Any) -> dict[str, Tensor]:
    """The tensors of a saved adapter, by their names in its file, which have no adapter's name.

    Raises:
        ValueError: the file is damaged.
        OSError: there is none.
    """
    from peft import load_peft_weights

    try:
        return load_peft_weights(
            str(folder),
            device="cpu",
            key_mapping=kwargs.get("key_mapping"),
            **_hub_options(kwargs),
        )
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"the weights of the adapter in {folder} ({' or '.join(_WEIGHTS)}) cannot be read: "
            f"{error}. Save the adapter again, or download it again."
        ) from error


def check_ranks(folder: str | os.PathLike[str], config: Any, found: dict[str, Tensor]) -> None:
    """Refuse ranks that a file's tensors are too small for, before PEFT makes tensors of these ranks.

    Args:
        folder: for the error.
        config: of the adapter.
        found: the file's tensors.

    Raises:
        ValueError: the largest rank, and what the file has.
    """
    asked = max(config.r, *(getattr(config, "rank_pattern", None) or {}).values(), 1)
    longest = max((max(tensor.shape, default=0) for tensor in found.values()), default=0)
    if asked > longest:
        raise ValueError(
            f"{folder} is damaged: its settings have rank {asked}, and none of its tensors is longer "
            f"than {longest}. Save it again, or download it again."
        )


def check_tensors(
    folder: str | os.PathLike[str], found: dict[str, Tensor], model: Any, adapter_name: str
) -> None:
    """Refuse a file that has not the tensors of its adapter: what is missing stays as it was drawn.

    Nor may floats stand where places are stored, or the other way round.

    Embeddings may be there: PEFT saves them beside an adapter where the vocabulary has grown.

    Args:
        folder: for the error.
        found: the file's tensors.
        model: a PeftModel that has the adapter.
        adapter_name: the adapter.

    Raises:
        ValueError: tensors are missing, unexpected, or of another kind of numbers.
    """
    from peft import get_peft_model_state_dict

    wanted, allowed = (
        get_peft_model_state_dict(
            model, adapter_name=adapter_name, save_embedding_layers=embeddings
        )
        for embeddings in (False, True)
    )
    missing, unexpected = sorted(wanted.keys() - found), sorted(found.keys() - allowed)
    parts = [
        f"{len(names)} of its tensors are {kind} (first {names[0]})"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if parts:
        raise ValueError(
            f"{folder} is damaged, or was made for another model or with other settings: "
            f"{', '.join(parts)}; wanted {len(wanted)} tensors. Save it again, or load it on the "
            "sparse model that it was trained on."
        )
    for name, tensor in found.items():
        floats = allowed[name].is_floating_point()
        if (
            tensor.is_floating_point() != floats
            or tensor.dtype is torch.bool
            or tensor.is_complex()
        ):
            raise ValueError(
                f"{folder} is damaged: its tensor {name} is of {tensor.dtype}; wanted "
                f"{'floats' if floats else 'whole numbers'}. Save it again, or download it again."
            )


def _hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the keywords that say where on the Hub a file is."""
    known = inspect.signature(hf_hub_download).parameters
    return {name: kwargs[name] for name in kwargs if name in known and kwargs[name] is not None}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_expressions(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_fast_expression, value))


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _is_table(value: Any, allowed: Callable[[Any], bool]) -> bool:
    named = isinstance(value, dict) and all(map(is_fast_expression, value))
    return named and all(map(allowed, value.values()))


_TARGETS = (
    lambda v: v is None or _is_names(v) or is_fast_expression(v),
    "a list of names or a regular expression, without repeats inside of repeats",
)
_FLAGS = (
    *("inference_mode", "fan_in_fan_out", "use_rslora", "use_dora", "use_qalora", "lora_bias"),
    *("ensure_weight_tying", "init_weights", "masked"),
)
# What a setting may be, as JSON holds it, and how an error says so.
_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda v: v is None or isinstance(v, str), "a text, or null"),
    "r": (_is_rank, "a whole number >= 1"),
    "lora_alpha": (_is_number, "a finite number"),
    "lora_dropout": (lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 on, below 1"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "layers_pattern": (
        lambda v: v is None or is_fast_expression(v) or _are_expressions(v),
        "a regular expression without repeats inside of repeats, or a list of them",
    ),
    "modules_to_save": (lambda v: v is None or _is_names(v), "a list of names, or null"),
    "rank_pattern": (lambda v: v is None or _is_table(v, _is_rank), "names with whole numbers"),
    "alpha_pattern": (lambda v: v is None or _is_table(v, _is_number), "names with finite numbers"),
    "base_model_name_or_path": (lambda v: v is None or isinstance(v, str), "a text, or null"),
    "base_zeros": (lambda v: v is None or isinstance(v, str), "a text, or null"),
    "init_lora_weights": (lambda v: isinstance(v, bool | str), "true, false, or a name"),
    "layers_to_transform": (
        lambda v: v is None or _are_numbers([v]) or _are_numbers(v),
        "the number of a layer, or a list of them",
    ),
    "trainable_token_indices": (
        lambda v: (
            v is None
            or _are_numbers(v)
            or (isinstance(v, dict) and all(map(_are_numbers, v.values())))
        ),
        "a list of tokens' numbers, or names of embeddings with such lists",
    ),
    "random_seed": (
        lambda v: v is None or (type(v) is int and abs(v) < 2**63),
        "a whole number below 2**63, or null",
    ),
    **dict.fromkeys(_FLAGS, (_is_flag, "true or false")),
}
