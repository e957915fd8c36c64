"""Adapters of PEFT are merged into the weights of a sparse model: no zero is filled."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from hf_sparse.adapters.checks import (
    adapted_layers,
    check_adapter_finite,
    check_base_zeros,
    check_gathered,
    check_keeps_zeros,
    check_kept_apart,
    kept_weights,
)
from hf_sparse.arguments import check_has_values, check_kinds, check_model
from hf_sparse.optim.zeros import refill_
from hf_sparse.provenance.optimizers import optimizer_of
from hf_sparse.provenance.record import record_merge_
from hf_sparse.provenance.values import Step
from hf_sparse.suggestions import deprecated_name
from hf_sparse.upstream.peft_by_name import is_peft_model


def merge_adapters_(model: Any, adapter_names: Sequence[str] | None = None) -> Any:
    """Merge the adapters of a PeftModel into its base model, and keep exactly its zeros.

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
    check_model(model, "merge_adapters_")
    check_kinds(merge_adapters_, locals())
    if not is_peft_model(model):
        raise ValueError(
            f"a {type(model).__name__} has no adapters to merge; wanted what "
            "hf_sparse.get_peft_model or load_adapter returned, or of a wrapped model the model inside "
            "(accelerator.unwrap_model)."
        )
    check_has_values(model, "merge_adapters_")
    chosen = list(adapter_names or model.active_adapters)
    configs = {name: model.peft_config[name] for name in chosen if name in model.peft_config}
    base = model.get_base_model()
    training = {name: dict(optimizer_of(base, name)) for name in chosen}
    merged = merge_(model, chosen)
    record_merge_(
        merged,
        [
            Step.of("merged adapter", {**_settings_of(configs[name]), **training[name]})
            for name in chosen
        ],
    )
    return merged


merge_adapters = deprecated_name("merge_adapters", merge_adapters_)


def merge_(model: Any, chosen: Sequence[str] | None = None) -> Any:
    """`merge_adapters_` that adds no step to what is known of the model."""
    layers = adapted_layers(model)
    check_gathered(layers)
    chosen = list(chosen or model.active_adapters)
    if unknown := sorted(set(chosen) - set(model.peft_config)):
        raise ValueError(
            f"no adapter {', '.join(unknown)}; there are {', '.join(model.peft_config)}."
        )
    check_kept_apart(model)
    with torch.no_grad():
        if any(layer.merged for _, layer in layers):  # by PEFT's merge_adapter
            model.unmerge_adapter()
        for adapter in chosen:
            check_adapter_finite(model, adapter)
        for name, layer in layers:
            check_keeps_zeros(name, layer, chosen)
        for adapter in chosen:
            check_base_zeros(model, adapter)
        kept = [(layer.get_base_layer(), kept_weights(layer)) for _, layer in layers]
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
        ValueError: see `merge_adapters_`.
    """
    check_gathered(adapted_layers(model))
    return merge_adapters_(copy.deepcopy(model))


def _settings_of(config: Any) -> dict[str, Any]:
    """The settings of an adapter that the model card tells."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    values = {name: getattr(config, name, None) for name in ("r", "lora_alpha")}
    return {"kind": str(kind).lower()} | {
        k: value for k, value in values.items() if value is not None
    }
