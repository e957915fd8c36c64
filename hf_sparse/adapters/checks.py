"""What is asked of a model and its adapters before zeros are promised."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_sparse.adapters.stored import check_settings
from hf_sparse.arguments import is_finite
from hf_sparse.optim.zeros import (
    is_sparse,
    is_whole,
    num_zeros,
    unlike,
    zeros_hash,
)
from hf_sparse.structure.layers import is_conv1d
from hf_sparse.structure.weights import check_floats
from hf_sparse.suggestions import shortened
from hf_sparse.upstream.peft_by_name import is_peft_model
from hf_sparse.upstream.transformers.models import quantized_by


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> list[tuple[str, Any]]:
    """The layers that have an adapter, or the one of this name, with their names."""
    from hf_sparse.upstream.peft import BaseTunerLayer, adapters_of

    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and (adapter_name is None or adapter_name in adapters_of(module))
    ]


def check_kept_apart(model: nn.Module) -> None:
    """Refuse what would fill zeros beside adapters: sparse layers that are trained as a whole."""
    from hf_sparse.upstream.peft import trained_whole

    for name, module in trained_whole(model):
        if any(p.ndim == 2 and is_sparse(p.detach()) for p in module.original_module.parameters()):
            raise ValueError(
                f"{name} is in modules_to_save, which trains all its weights, and it has zeros: they "
                "would be filled. Put it into target_modules, or leave it out."
            )


def check_gathered(layers: list[tuple[str, Any]]) -> None:
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


def check_adapted(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter on no sparse layer; warn of the dense ones among its layers."""
    layers = adapted_layers(model, adapter_name)
    check_kept_apart(model)
    named = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    dense = []
    for name, layer in layers:
        base = layer.get_base_layer()
        check_plain(name, base)
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


def check_trainable(config: Any) -> None:
    """Refuse settings with which an adapter could not be trained, or not be loaded again."""
    way_out = "Correct it: every setting is as in PEFT."
    values = {
        name: value
        for name, value in vars(config).items()
        if not isinstance(value, float) or math.isfinite(value)  # else the layer is named later
    }
    check_settings(values, f"the {type(config).__name__}", way_out)
    if getattr(config, "inference_mode", False):
        raise ValueError(
            "inference_mode=True makes an adapter that is not trained. Leave it out; a trained adapter "
            "is loaded by hf_sparse.load_adapter(model, folder)."
        )


def check_tokens(model: Any, config: Any) -> None:
    """Refuse tokens that an embedding does not have among `trainable_token_indices`."""
    wanted = getattr(config, "trainable_token_indices", None) or {}
    if not isinstance(wanted, dict):
        embedding = model.get_input_embeddings()
        wanted = {name: wanted for name, part in model.named_modules() if part is embedding}
    for ending, tokens in wanted.items():
        highest = max(tokens, default=0)
        for name, part in model.named_modules():
            named = isinstance(part, nn.Embedding) and f".{name}".endswith(f".{ending}")
            if named and highest >= part.num_embeddings:
                raise ValueError(
                    f"trainable_token_indices names token {highest}; {name} has "
                    f"{part.num_embeddings}: wanted numbers from 0 to {part.num_embeddings - 1}. "
                    "After resize_token_embeddings there are more."
                )


def check_mergeable(model: Any, adapter_name: str) -> None:
    """Refuse an adapter that can be trained and never merged, or whose update is always zero."""
    for name, layer in adapted_layers(model, adapter_name):
        if getattr(layer, "scaling", {}).get(adapter_name, 1.0) == 0:
            raise ValueError(
                f"the adapter changes nothing in {name}: lora_alpha (or alpha_pattern) is 0; wanted a "
                "number that is not 0, such as lora_alpha=16."
            )
        biased = getattr(layer, "lora_bias", {}).get(adapter_name, False)
        if biased and getattr(layer.get_base_layer(), "bias", None) is None:
            raise ValueError(
                f"{name} has no bias that lora_bias=True could be merged into: the adapter could be "
                "trained, and neither merged nor saved as a model. Leave lora_bias out, or leave the "
                "layers without bias out of target_modules."
            )


def check_targets(model: Any, config: Any) -> None:
    """Refuse targets that no adapter which keeps zeros is for, before PEFT changes any layer."""
    from hf_sparse.upstream.peft import is_target

    model = model.get_base_model() if is_peft_model(model) else model
    adapted = tuple(f"{name}." for name, _ in adapted_layers(model))
    for name, module in model.named_modules():
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if isinstance(base, nn.Linear) or is_conv1d(base) or name.startswith(adapted):
            continue
        if config.target_modules and is_target(config, name):
            raise ValueError(
                f"{name} is of class {type(base).__name__}; adapters that keep zeros are for Linear "
                "and Conv1D layers of floats. Leave it out of target_modules."
            )
    _check_matches(model, config)


def _check_matches(model: nn.Module, config: Any) -> None:
    """Refuse settings that name no layer of a model, or a rank beyond all of its layers."""
    from hf_sparse.upstream.peft import is_target

    layers = {name: module for name, module in model.named_modules() if _is_adaptable(name, module)}
    named = config.target_modules not in (None, "all-linear")
    if named and not any(is_target(config, name) for name in layers):
        examples = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
        raise ValueError(
            f"no layer is left to adapt: target_modules={_listed(config.target_modules)}, without "
            "what exclude_modules and layers_to_transform leave out, names no Linear or Conv1D layer "
            f"of the {type(model).__name__}. Its layers: {', '.join(examples[:12])}."
        )
    weights = [getattr(module, "weight", None) for module in layers.values()]
    most = max((sum(w.shape) for w in weights if isinstance(w, Tensor)), default=0)
    asked = max(config.r, *(getattr(config, "rank_pattern", None) or {}).values(), 1)
    if asked > most:
        raise ValueError(
            f"rank {asked} is more than any layer has use for; wanted r (and rank_pattern) of at most "
            f"{most}, inputs and outputs of the largest layer, such as r=16."
        )


def check_saved_modules(model: nn.Module, config: Any) -> None:
    """Refuse `modules_to_save` that name nothing; in files PEFT has added the names of heads."""
    saved = config.modules_to_save or ()
    if saved and not any(name.endswith(tuple(saved)) for name, _ in model.named_modules()):
        raise ValueError(
            f"modules_to_save={_listed(saved)} names no module of the {type(model).__name__}: nothing "
            "of it would be trained. Correct the names, or leave it out."
        )


def _is_adaptable(name: str, module: Any) -> bool:
    """Whether this is a layer that adapters are for, with or without one; not the base layer inside."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return (isinstance(base, nn.Linear) or is_conv1d(base)) and not name.endswith(".base_layer")


def _listed(value: Any) -> str:
    """A setting's names, in an order that does not change, at most a line of them."""
    return shortened(value if isinstance(value, str) else sorted(value))


def check_plain(name: str, layer: nn.Module) -> None:
    """Refuse layers that compute something else than a product with their weight."""
    check_floats(name, layer.weight)  # type: ignore[arg-type]
    forward = type(layer).forward
    if isinstance(layer, nn.Linear) and forward is not nn.Linear.forward:
        raise ValueError(
            f"{name} is a {type(layer).__name__} with a forward of its own (quantization-aware "
            "training, or another adapter); wanted a plain Linear. Convert the model back to float "
            "layers first."
        )


def check_alone(model: Any) -> None:
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


def check_not_quantized(model: Any) -> None:
    method = quantized_by(model)
    if method is not None:
        raise ValueError(
            f"the model is quantized ({method}): its zeros cannot be told. "
            "Load it without quantization, in bfloat16 to save memory, or call model.dequantize()."
        )


def check_keeps_zeros(name: str, layer: Any, adapters: Sequence[str]) -> None:
    from hf_sparse.upstream.peft import adapters_of

    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not is_sparse(weight) or layer.merged:
        return
    own = adapters_of(layer)
    for adapter in adapters:
        if adapter not in own or not hasattr(layer, "get_delta_weight"):
            continue
        delta = layer.get_delta_weight(adapter)
        delta = delta.to_dense() if delta.is_sparse else delta
        if not is_finite(weight + delta.to(weight.dtype)):
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


def check_adapter_finite(model: Any, adapter: str, where: str = "") -> None:
    """Refuse an adapter with NaN or infinity in what is trained, or in its scale."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():  # PEFT takes the vectors of lora_bias for shards of matrices
        warnings.filterwarnings("ignore", ".*LoRA tensor.*have invalid shape")
        tensors = get_peft_model_state_dict(
            model, adapter_name=adapter, save_embedding_layers=False
        )
    names = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    for name, layer in adapted_layers(model, adapter):
        if not math.isfinite(getattr(layer, "scaling", {}).get(adapter, 1.0)):
            names.append(f"the scale of {name}")
    if names:
        raise ValueError(
            f"adapter '{adapter}'{where} has values that are not finite, in {len(names)} places (first "
            f"{names[0]}): its training has diverged, or its file is damaged. Train it again at a "
            "lower learning rate, or with a finite lora_alpha."
        )


def check_base_zeros(model: Any, adapter: str) -> None:
    """Refuse a base model whose zeros are others than when the adapter was made or loaded."""
    known = getattr(model.peft_config[adapter], "base_zeros", None)
    if known is not None and known != zeros_of(model, adapter):
        raise ValueError(
            f"the base model's zeros are not those that adapter '{adapter}' was made for: its weights "
            "were changed since (a state was loaded, or the model pruned). Load the base model that "
            "belongs to the adapter, and the adapter on it by hf_sparse.load_adapter."
        )


def kept_weights(layer: Any) -> Tensor | None:
    """Where the weight of a sparse layer is not zero."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(weight, Tensor) or not is_sparse(weight):
        return None
    return unlike(weight.detach()).bool()


def zeros_of(model: nn.Module, adapter_name: str) -> str:
    """The hash of the zeros of the layers that an adapter masks; ShiRA's are all of its layers."""
    layers = [
        layer
        for _, layer in adapted_layers(model, adapter_name)
        if adapter_name in getattr(layer, "lora_variant", (adapter_name,))
    ]
    return zeros_hash(layer.get_base_layer().weight.detach() for layer in layers)
