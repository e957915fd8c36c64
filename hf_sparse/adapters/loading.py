"""Adapters of PEFT for sparse models, made and loaded so that no zero is filled.

| `config` | what is trained | what stock PEFT does with the saved adapter |
|---|---|---|
| `peft.LoraConfig` | masked LoRA: see `hf_sparse.adapters.masked_lora` | refuses to load it |
| `peft.ShiraConfig` | single kept weights: see `hf_sparse.adapters.shira` | loads it, the same |
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_sparse.adapters.checks import (
    adapted_layers,
    check_adapted,
    check_adapter_finite,
    check_alone,
    check_kept_apart,
    check_mergeable,
    check_not_quantized,
    check_plain,
    check_saved_modules,
    check_targets,
    check_tokens,
    check_trainable,
    zeros_of,
)
from hf_sparse.adapters.stored import check_ranks, check_tensors, stored_config, stored_weights
from hf_sparse.arguments import (
    check_has_values,
    check_kinds,
    check_model,
    check_not_inference,
    check_path,
)
from hf_sparse.provenance.optimizers import notice_optimizer_
from hf_sparse.upstream.transformers.files import ADAPTER_CONFIG_NAME

_INSTALL = "adapters need PEFT: pip install 'hf_sparse[peft]'"


def get_peft_model(model: Any, config: Any, adapter_name: str = "default") -> Any:
    """`peft.get_peft_model` for a sparse model: an adapter that leaves its zeros zero.

    >>> model = hf_sparse.get_peft_model(model, peft.LoraConfig(r=16))    # doctest: +SKIP

    Args:
        model: the sparse model; or what this function returned, to add one more adapter.
        config: a `peft.LoraConfig` (the update is masked) or a `peft.ShiraConfig` (kept weights
            alone are trained). Its `target_modules` may be dense layers too: there the adapter is
            plain LoRA or ShiRA, and a warning tells.
        adapter_name: as in PEFT.

    Returns:
        A `peft.PeftModel`. Before it is published it should be merged: `save_pretrained` and
        `push_to_hub` of hf_sparse do that. The adapter alone is saved by the PeftModel's own
        `save_pretrained`, and loaded by `hf_sparse.load_adapter`.

    Memory: the base weights have no gradients and no optimizer state. In a forward pass, one masked
    weight at a time.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: another kind of adapter, settings that cannot be trained, saved or merged (see
            docs/recovery.md), layers that are no Linear or Conv1D, quantized or sharded ones, no
            sparse layer among the targets, or ShiRA with an `r` that asks for more weights than a
            layer keeps.
    """
    peft = import_peft()
    check_model(model, "get_peft_model")
    check_has_values(model, "get_peft_model")
    check_not_inference(model, "get_peft_model")
    check_kinds(get_peft_model, locals())
    check_trainable(config)
    if isinstance(config, peft.LoraConfig):
        config = _masked(config)
    elif isinstance(config, peft.ShiraConfig):
        from hf_sparse.adapters.shira import on_kept_weights

        config = on_kept_weights(config, model)
    else:
        raise ValueError(
            f"config is a {type(config).__name__}; wanted peft.LoraConfig or peft.ShiraConfig: of "
            "other adapters it is not known that they keep zeros."
        )
    check_alone(model)
    check_not_quantized(model)
    check_targets(model, config)
    check_saved_modules(model, config)
    check_tokens(model, config)
    with _undone_on_error(model, adapter_name), _without_deprecations():
        if isinstance(model, peft.PeftModel):
            model.add_adapter(adapter_name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name)
        check_adapted(model, adapter_name)
        check_mergeable(model, adapter_name)
        check_adapter_finite(model, adapter_name)
    model.peft_config[adapter_name].base_zeros = zeros_of(model, adapter_name)
    notice_optimizer_(model.get_base_model())
    return model


def load_adapter(
    model: Any,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a saved PEFT adapter on the sparse model that it was trained on.

    Args:
        model: the sparse base model, or a PeftModel that has other adapters.
        folder: with `adapter_config.json`, or a repository of the Hub.
        adapter_name: as in PEFT.
        is_trainable: to go on training it.
        **kwargs: others of `peft.PeftModel.from_pretrained`.

    Returns:
        A `peft.PeftModel`. Masks are made from the model's zeros; none is stored.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: an adapter without a mask, whose merge would fill zeros, or one that was made for
            a model with other zeros or shapes, or a quantized or sharded model.
            Or its files are damaged: settings that cannot be, tensors that are missing or too many,
            values that are not finite.
        OSError: there is no such adapter.
    """
    peft = import_peft()
    check_model(model, "load_adapter")
    check_path(folder, "load_adapter")
    check_has_values(model, "load_adapter")
    check_kinds(load_adapter, locals())
    config = _config_of(folder, **kwargs)
    check_alone(model)
    check_not_quantized(model)
    weights = stored_weights(folder, **kwargs)
    check_ranks(folder, config, weights)
    check_targets(model, config)
    config.inference_mode = not is_trainable
    with (
        _undone_on_error(model, adapter_name),
        _misfits_explained(folder),
        _without_deprecations(),
    ):
        if isinstance(model, peft.PeftModel):
            model.add_adapter(adapter_name, config)
            model.load_adapter(folder, adapter_name, is_trainable=is_trainable, **kwargs)
        else:
            model = peft.PeftModel.from_pretrained(
                model, folder, adapter_name, is_trainable=is_trainable, config=config, **kwargs
            )
        check_tensors(folder, weights, model, adapter_name)
        _check_fits(folder, config, model, adapter_name)
    if is_trainable:
        notice_optimizer_(model.get_base_model())
    return model


def _config_of(folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The settings of the adapter in a folder, if it is of a kind that keeps zeros."""
    from hf_sparse.adapters.masked_lora import MASKED_LORA, MaskedLoraConfig
    from hf_sparse.adapters.shira import KeptShiraConfig

    values = stored_config(folder, **kwargs)
    kind = values.pop("peft_type", None)
    kind = kind.partition(":")[0] if isinstance(kind, str) else kind
    configs: dict[str, Any] = {MASKED_LORA: MaskedLoraConfig, "SHIRA": KeptShiraConfig}
    if kind not in configs:
        raise ValueError(
            f"{folder} is an adapter of type {kind} without a mask: on a sparse model it is dense, and "
            "merging it fills the zeros. Train it with hf_sparse.get_peft_model; or load it with "
            "peft.PeftModel.from_pretrained and never merge it."
        )
    if unknown := sorted(set(values) - set(configs[kind].__dataclass_fields__)):
        raise ValueError(
            f"{folder}/{ADAPTER_CONFIG_NAME} has unknown settings {', '.join(unknown)}: a newer "
            "version wrote it. Upgrade: pip install -U hf_sparse peft"
        )
    try:
        return configs[kind](**values)
    except (TypeError, AttributeError) as error:
        raise _refused_by_peft(folder, error) from error


def _refused_by_peft(folder: str | os.PathLike[str], error: Exception) -> ValueError:
    """What to tell where PEFT stumbles over a setting."""
    return ValueError(
        f"{folder}/{ADAPTER_CONFIG_NAME} has settings that PEFT cannot follow: {error} Correct them, "
        "or save the adapter again."
    )


def _check_fits(folder: str | os.PathLike[str], config: Any, model: Any, adapter_name: str) -> None:
    """Raise a ValueError unless a loaded adapter was made for the zeros of its model."""
    from hf_sparse.adapters.shira import KeptShiraConfig, check_places

    is_shira = isinstance(config, KeptShiraConfig)
    check_kept_apart(model)
    for name, layer in adapted_layers(model, adapter_name):
        check_plain(name, layer.get_base_layer())
    if is_shira:
        check_places(model, adapter_name)
    check_adapter_finite(model, adapter_name, f" of {folder}")
    if is_shira and config.base_zeros is None:
        warnings.warn(
            f"{folder} holds no hash of its base model's zeros, as stock PEFT writes it: it fills "
            "none of this model's, but may have been trained on another model.",
            stacklevel=3,
        )
    elif config.base_zeros != zeros_of(model, adapter_name):
        raise ValueError(
            f"{folder} was made for a model whose zeros are at other places (or on other layers). "
            "Load it on the sparse model that it was trained on."
        )


def _masked(config: Any) -> Any:
    """A LoraConfig with the same settings that masks."""
    from hf_sparse.adapters.masked_lora import MaskedLoraConfig

    if isinstance(config, MaskedLoraConfig):
        return copy.deepcopy(config)
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return MaskedLoraConfig(**copy.deepcopy(values))


@contextmanager
def _undone_on_error(model: Any, adapter_name: str) -> Iterator[None]:
    """Take an adapter off again that is refused: the model is as it was then."""
    peft = import_peft()
    known = set(getattr(model, "peft_config", {}))
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = list(model.active_adapters) if isinstance(model, peft.PeftModel) else []
    biases = [  # which an adapter with bias="all" puts its own values into
        (parameter, parameter.detach().clone())
        for name, parameter in model.named_parameters()
        if name.endswith("bias")
    ]
    try:
        yield
    except BaseException:
        if not isinstance(model, peft.PeftModel):
            _take_off(model)
        elif adapter_name not in known and adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
            model.base_model.set_adapter(active)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for parameter, before in biases:
            parameter.data.copy_(before)
        raise


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """Keep back what transformers says to PEFT, which reads a name that it has deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


@contextmanager
def _misfits_explained(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Explain an error of PEFT, which cannot put an adapter's weights into the model."""
    try:
        yield
    except KeyError as error:  # a tensor of modules_to_save
        if "." not in str(error):
            raise
        raise ValueError(
            f"{folder} is damaged: its tensor {error} is missing. Save it again, or download it again."
        ) from error
    except (TypeError, AttributeError) as error:
        raise _refused_by_peft(folder, error) from error
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if not lines:
            raise
        raise ValueError(
            f"{folder} was made for a model of other shapes ({lines[0].rstrip('.')}; {len(lines)} in "
            "all). Load it on the sparse model that it was trained on."
        ) from error


def _take_off(model: nn.Module) -> None:
    """Put the layers of a model back that a half-made adapter has replaced."""
    from hf_sparse.upstream.peft import wrapped_whole

    for name, module in wrapped_whole(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.original_module)
    for name, layer in adapted_layers(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    vars(model).pop("peft_config", None)


def import_peft() -> Any:
    """The package PEFT.

    Raises:
        ImportError: it is not installed; how to.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    return peft
