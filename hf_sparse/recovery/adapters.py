"""Adapters of PEFT for sparse models: made, loaded and merged so that no zero is filled.

| `config` | what is trained | what stock PEFT does with the saved adapter |
|---|---|---|
| `peft.LoraConfig` | masked LoRA: see `hf_sparse.recovery.masked_lora` | refuses to load it |
| `peft.ShiraConfig` | single kept weights: see `hf_sparse.recovery.shira` | loads it, the same |
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_sparse.recovery.stored import check_tensors, stored_config, stored_weights
from hf_sparse.recovery.zeros import (
    check_floats,
    fingerprint,
    is_sparse,
    is_whole,
    num_zeros,
    refill_,
    unlike,
)
from hf_sparse.structure import is_conv1d

_CONFIG = "adapter_config.json"
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
        ValueError: another kind of adapter, layers that are no Linear or Conv1D, quantized or
            sharded ones, no sparse layer among the targets, or
            ShiRA with an `r` that asks for more weights than a layer keeps.
    """
    peft = _import_peft()
    if isinstance(config, peft.LoraConfig):
        config = _masked(config)
    elif isinstance(config, peft.ShiraConfig):
        from hf_sparse.recovery.shira import on_kept_weights

        config = on_kept_weights(config, model)
    else:
        raise ValueError(
            f"config is a {type(config).__name__}; wanted peft.LoraConfig or peft.ShiraConfig: of "
            "other adapters it is not known that they keep zeros."
        )
    _check_alone(model)
    _check_not_quantized(model)
    _check_targets(model, config)
    with _undone_on_error(model, adapter_name):
        if isinstance(model, peft.PeftModel):
            model.add_adapter(adapter_name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name)
        _check_adapted(model, adapter_name)
        _check_finite(model, adapter_name)
    model.peft_config[adapter_name].base_zeros = _zeros_of(model, adapter_name)
    return model


def load_adapter(
    model: Any,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    **kwargs: Any,
) -> Any:
    """Load an adapter on the sparse model that it was made for: the counterpart of its saving.

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
    peft = _import_peft()
    from hf_sparse.recovery.masked_lora import MASKED_LORA, MaskedLoraConfig
    from hf_sparse.recovery.shira import KeptShiraConfig, check_places

    values = stored_config(folder, **kwargs)
    kind = values.pop("peft_type", None)
    kinds: dict[str, Any] = {MASKED_LORA: MaskedLoraConfig, "SHIRA": KeptShiraConfig}
    if kind not in kinds:
        raise ValueError(
            f"{folder} is an adapter of type {kind} without a mask: on a sparse model it is dense, and "
            "merging it fills the zeros. Train it with hf_sparse.get_peft_model; or load it with "
            "peft.PeftModel.from_pretrained and never merge it."
        )
    if unknown := sorted(set(values) - set(kinds[kind].__dataclass_fields__)):
        raise ValueError(
            f"{folder}/{_CONFIG} has unknown settings {', '.join(unknown)}: a newer version wrote "
            "it. Upgrade: pip install -U hf_sparse peft"
        )
    config = kinds[kind](**values)
    _check_alone(model)
    _check_not_quantized(model)
    _check_targets(model, config)
    config.inference_mode = not is_trainable
    weights = stored_weights(folder, **kwargs)
    with _undone_on_error(model, adapter_name), _told_of_misfits(folder):
        if isinstance(model, peft.PeftModel):
            model.add_adapter(adapter_name, config)
            model.load_adapter(folder, adapter_name, is_trainable=is_trainable, **kwargs)
        else:
            model = peft.PeftModel.from_pretrained(
                model, folder, adapter_name, is_trainable=is_trainable, config=config, **kwargs
            )
        check_tensors(folder, weights, model, adapter_name)
        _check_kept_apart(model)
        for name, layer in adapted_layers(model, adapter_name):
            _check_plain(name, layer.get_base_layer())
        if kind == "SHIRA":
            check_places(model, adapter_name)
        _check_finite(model, adapter_name, f" of {folder}")
        if kind == "SHIRA" and config.base_zeros is None:
            warnings.warn(
                f"{folder} holds no hash of its base model's zeros, as stock PEFT writes it: it fills "
                "none of this model's, but may have been trained on another model.",
                stacklevel=2,
            )
        elif config.base_zeros != _zeros_of(model, adapter_name):
            raise ValueError(
                f"{folder} was made for a model whose zeros are at other places (or on other layers). "
                "Load it on the sparse model that it was trained on."
            )
    return model


def merge_adapters(model: Any, adapter_names: Sequence[str] | None = None) -> Any:
    """Merge the adapters of a PeftModel into its base model, whose zeros stay, to the weight.

    Args:
        model: a `peft.PeftModel`; afterwards it has no adapters.
        adapter_names: which of them; None: the active ones.

    Returns:
        The base model, a plain model again.

    Raises:
        ValueError: an adapter would fill zeros (a stock LoRA) or has values that are not finite, the
            base model's zeros were changed since the adapter was made, or its weights are cut into
            shards. The model is as it was then.
    """
    if not is_peft_model(model):
        raise ValueError(
            f"a {type(model).__name__} has no adapters to merge; wanted what "
            "hf_sparse.get_peft_model or load_adapter returned, or of a wrapped model the model inside "
            "(accelerator.unwrap_model)."
        )
    layers = adapted_layers(model)
    _check_gathered(layers)
    chosen = list(adapter_names or model.active_adapters)
    if unknown := sorted(set(chosen) - set(model.peft_config)):
        raise ValueError(
            f"no adapter {', '.join(unknown)}; there are {', '.join(model.peft_config)}."
        )
    _check_kept_apart(model)
    with torch.no_grad():
        if any(layer.merged for _, layer in layers):  # by PEFT's merge_adapter
            model.unmerge_adapter()
        for adapter in chosen:
            _check_finite(model, adapter)
        for name, layer in layers:
            _check_keeps_zeros(name, layer, chosen)
        for adapter in chosen:
            _check_base_zeros(model, adapter)
        kept = [(layer.get_base_layer(), _kept(layer)) for _, layer in layers]
        merged = model.merge_and_unload(adapter_names=chosen)
        for (name, _), (base, mask) in zip(layers, kept, strict=True):
            if mask is not None:
                filled = int(((base.weight != 0) & ~mask).sum())
                if filled:  # a kind of adapter that does not tell what it adds
                    raise ValueError(f"{name}: merging has filled {filled} zeros. Load it again.")
                refill_(base.weight.data, mask.to(base.weight.dtype))
    return merged


def merged_copy(model: Any) -> Any:
    """The base model with the active adapters merged; the PeftModel stays as it is.

    Memory: a second model.

    Raises:
        ValueError: see `merge_adapters`.
    """
    _check_gathered(adapted_layers(model))
    return merge_adapters(copy.deepcopy(model))


def is_peft_model(model: Any) -> bool:
    """Whether this is a `peft.PeftModel`; PEFT is not imported to tell."""
    return any(
        base.__module__.startswith("peft.") and base.__name__ == "PeftModel"
        for base in type(model).__mro__
    )


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> list[tuple[str, Any]]:
    """The layers that have an adapter, or the one of this name, with their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            own = {key for part in module.adapter_layer_names for key in getattr(module, part, {})}
            if adapter_name is None or adapter_name in own:
                found.append((name, module))
    return found


def _masked(config: Any) -> Any:
    """A LoraConfig with the same settings that masks."""
    from hf_sparse.recovery.masked_lora import MaskedLoraConfig

    if isinstance(config, MaskedLoraConfig):
        return copy.deepcopy(config)
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return MaskedLoraConfig(**copy.deepcopy(values))


@contextmanager
def _undone_on_error(model: Any, adapter_name: str) -> Iterator[None]:
    """Take an adapter off again that is refused: the model is as it was then."""
    peft = _import_peft()
    known = set(getattr(model, "peft_config", {}))
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = list(model.active_adapters) if isinstance(model, peft.PeftModel) else []
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
        raise


@contextmanager
def _told_of_misfits(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Tell in our words of an adapter whose weights PEFT cannot put into the model."""
    try:
        yield
    except KeyError as error:  # a tensor of modules_to_save
        if "." not in str(error):
            raise
        raise ValueError(
            f"{folder} is damaged: its tensor {error} is missing. Save it again, or download it again."
        ) from error
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if not lines:
            raise
        raise ValueError(
            f"{folder} was made for a model of other shapes ({lines[0].rstrip('.')}; {len(lines)} in "
            "all). Load it on the sparse model that it was trained on."
        ) from error


def _check_kept_apart(model: nn.Module) -> None:
    """Refuse what would fill zeros beside adapters: sparse layers that are trained as a whole."""
    for name, module in model.named_modules():
        if type(module).__name__ != "ModulesToSaveWrapper":
            continue
        if any(p.ndim == 2 and is_sparse(p.detach()) for p in module.original_module.parameters()):
            raise ValueError(
                f"{name} is in modules_to_save, which trains all its weights, and it has zeros: they "
                "would be filled. Put it into target_modules, or leave it out."
            )


def _check_gathered(layers: list[tuple[str, Any]]) -> None:
    """Refuse to merge into weights of which this process holds a shard."""
    for name, layer in layers:
        weight = getattr(layer.get_base_layer(), "weight", None)
        if isinstance(weight, Tensor) and not is_whole(weight):
            raise ValueError(
                f"{name} is cut into shards. To merge, gather the adapter: "
                "state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) "
                "of torch.distributed.checkpoint.state_dict, model.save_pretrained(folder, "
                "state_dict=state); then load_adapter(base, folder) on the whole base model."
            )


def _take_off(model: nn.Module) -> None:
    """Put the layers of a model back that a half-made adapter has replaced."""
    for name, layer in adapted_layers(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    vars(model).pop("peft_config", None)


def _check_adapted(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter on no sparse layer; warn of the dense ones among its layers."""
    layers = adapted_layers(model, adapter_name)
    _check_kept_apart(model)
    named = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    dense = []
    for name, layer in layers:
        base = layer.get_base_layer()
        _check_plain(name, base)
        if named[id(base.weight)] > 1:
            raise ValueError(
                f"{name} is tied to another layer (the embeddings, usually), which merging would "
                "change too. Leave it out of target_modules."
            )
        if not is_sparse(base.weight.detach()):
            dense.append(name)
    if len(dense) == len(layers):
        raise ValueError(
            f"none of the {len(layers)} layers that the adapter targets has zeros. For a dense model "
            "use peft.get_peft_model; else load the sparse checkpoint, or name its layers in "
            "target_modules."
        )
    if dense:
        warnings.warn(
            f"{len(dense)} of {len(layers)} adapted layers have no zeros to keep (first {dense[0]}): "
            "there the adapter is a plain one.",
            stacklevel=3,
        )


def _check_targets(model: Any, config: Any) -> None:
    """Refuse targets that no adapter which keeps zeros is for, before PEFT changes any layer."""
    from peft.tuners.tuners_utils import check_target_module_exists

    model = model.get_base_model() if is_peft_model(model) else model
    adapted = tuple(f"{name}." for name, _ in adapted_layers(model))
    for name, module in model.named_modules():
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if isinstance(base, nn.Linear) or is_conv1d(base) or name.startswith(adapted):
            continue
        if config.target_modules and check_target_module_exists(config, name):
            raise ValueError(
                f"{name} is of class {type(base).__name__}; adapters that keep zeros are for Linear "
                "and Conv1D layers of floats. Leave it out of target_modules."
            )


def _check_plain(name: str, layer: nn.Module) -> None:
    """Refuse layers that compute something else than a product with their weight."""
    check_floats(name, layer.weight)  # type: ignore[arg-type]
    forward = type(layer).forward
    if isinstance(layer, nn.Linear) and forward is not nn.Linear.forward:
        raise ValueError(
            f"{name} is a {type(layer).__name__} with a forward of its own (quantization-aware "
            "training, or another adapter); wanted a plain Linear. Convert the model back to float "
            "layers first."
        )


def _check_alone(model: Any) -> None:
    """Refuse a model that is spread over processes already: they would train other adapters."""
    if isinstance(model, DistributedDataParallel | FullyShardedDataParallel):
        raise ValueError(
            f"the model is wrapped in {type(model).__name__}, which does not see adapters that come "
            "later. Give the model inside, before it is wrapped (by Accelerate: prepared)."
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "the model's weights are cut into shards. Make or load the adapter on the whole model, "
            "before it is sharded (fully_shard, accelerator.prepare)."
        )


def _check_not_quantized(model: Any) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        found = getattr(quantizer.quantization_config, "quant_method", "?")
        raise ValueError(
            f"the model is quantized ({getattr(found, 'value', found)}): its zeros cannot be told. "
            "Load it without quantization, in bfloat16 to save memory, or call model.dequantize()."
        )


def _check_keeps_zeros(name: str, layer: Any, adapters: Sequence[str]) -> None:
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not is_sparse(weight) or layer.merged:
        return
    own = {key for part in layer.adapter_layer_names for key in getattr(layer, part, {})}
    for adapter in adapters:
        if adapter not in own or not hasattr(layer, "get_delta_weight"):
            continue
        delta = layer.get_delta_weight(adapter)
        delta = delta.to_dense() if delta.is_sparse else delta
        if not bool((weight + delta.to(weight.dtype)).isfinite().all()):
            raise ValueError(
                f"merging adapter '{adapter}' gives {name} values that are not finite in "
                f"{weight.dtype}: its training has diverged. Train it again at a lower learning rate."
            )
        if filled := int(((delta != 0) & (weight == 0)).sum()):
            raise ValueError(
                f"merging adapter '{adapter}' would fill {filled} of the {num_zeros(weight)} zeros of "
                f"{name}: it was trained without a mask. Train it with hf_sparse.get_peft_model, which "
                "masks it; or, for a dense model, merge with the model's own merge_and_unload()."
            )


def _check_finite(model: Any, adapter: str, where: str = "") -> None:
    """Refuse an adapter with NaN or infinity in what is trained, or in its scale."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    found = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    for name, layer in adapted_layers(model, adapter):
        if not math.isfinite(getattr(layer, "scaling", {}).get(adapter, 1.0)):
            found.append(f"the scale of {name}")
    if found:
        raise ValueError(
            f"adapter '{adapter}'{where} has values that are not finite, in {len(found)} places (first "
            f"{found[0]}): its training has diverged, or its file is damaged. Train it again at a "
            "lower learning rate, or with a finite lora_alpha."
        )


def _check_base_zeros(model: Any, adapter: str) -> None:
    """Refuse a base model whose zeros are others than when the adapter was made or loaded."""
    known = getattr(model.peft_config[adapter], "base_zeros", None)
    if known is not None and known != _zeros_of(model, adapter):
        raise ValueError(
            f"the base model's zeros are not those that adapter '{adapter}' was made for: its weights "
            "were changed since (a state was loaded, or the model pruned). Load the base model that "
            "belongs to the adapter, and the adapter on it by hf_sparse.load_adapter."
        )


def _kept(layer: Any) -> Tensor | None:
    """Where the weight of a sparse layer is not zero."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(weight, Tensor) or not is_sparse(weight):
        return None
    return unlike(weight.detach()).bool()


def _zeros_of(model: nn.Module, adapter_name: str) -> str:
    """The hash of the zeros of the layers that an adapter masks; ShiRA's are all of its layers."""
    layers = [
        layer
        for _, layer in adapted_layers(model, adapter_name)
        if adapter_name in getattr(layer, "lora_variant", (adapter_name,))
    ]
    return fingerprint(layer.get_base_layer().weight.detach() for layer in layers)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    return peft
