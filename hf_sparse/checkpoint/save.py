"""Saving a sparse model: compressed weights, a config that AutoModel finds, and a model card."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.utils import convert_file_size_to_int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils.quantization_config import QuantizationMethod

from hf_sparse.checkpoint.atomic import replacing
from hf_sparse.checkpoint.card import CARD_NAME, Metric, base_model, needs_card, write_card
from hf_sparse.checkpoint.quantizer import SparseCheckpointConfig
from hf_sparse.checkpoint.writing import ShardWriter, is_weight_file
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.formats import compress, num_nonzeros
from hf_sparse.models.configuration import CONFIGS, SparseConfigMixin, base_config_class
from hf_sparse.models.families import FAMILIES
from hf_sparse.patterns import NM
from hf_sparse.report import SparsityReport, TensorSparsity, count_zeros, measure_sparsity
from hf_sparse.structure import TargetLayer, num_parameters, target_layers, with_head_size

STUB_NAME = "modeling_hf_sparse.py"
# A fine-tuned model may lose a few zeros to training; more than this is worth a warning.
_LOST_SPARSITY = 0.005


def save_pretrained(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    config: SparsityConfig | None = None,
    *,
    tokenizer: Any = None,
    report: SparsityReport | None = None,
    metrics: Sequence[Metric] = (),
    tags: Sequence[str] = (),
    **kwargs: Any,
) -> Path:
    """Save a model so that `AutoModel*.from_pretrained(folder)` gives the same weights back.

    Weights of the config's targets are stored compressed, bit for bit (`-0.0` as `0.0`), under
    `model_type: "sparse_..."`. With `format="dense"` the zeros are written in place under the
    family's own type, which loads without hf_sparse. The folder's old files stay untouched until
    the new ones are complete (see `hf_sparse.checkpoint.atomic`).

    Args:
        model: a transformers model. Compressed: of a family in `FAMILIES`.
        folder: made if it does not exist. Other files in it stay.
        config: pattern, targets and format. None: what a Sparse model was loaded or pruned
            with; for other models `unstructured`, at the sparsity that is measured.
        tokenizer: saved beside the model if given.
        report: the `prune_` report, for the method on the model card.
        metrics: measured figures for the model card.
        tags: for the model card, beside its own.
        **kwargs: `max_shard_size` (default `"5GB"`), `state_dict`, `is_main_process` and `variant`
            as in `PreTrainedModel.save_pretrained`. Of several processes the first one saves.

    Returns:
        The folder.

    Memory: beside the model, one shard.

    Raises:
        ValueError: the model's family is not in `FAMILIES`, a weight breaks the N:M pattern that
            the config promises, or the format cannot hold it. Nothing has been written then.
        OSError: the folder cannot be written or the disk is full. Nothing has changed then.
    """
    folder = Path(folder)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model has adapters, which a sparse checkpoint does not hold. Save it without them "
            "(model.delete_adapter), or merge them; model.save_pretrained saves the adapter alone."
        )
    save_model(
        model,
        folder,
        config=config,
        tokenizer=tokenizer,
        report=report,
        metrics=metrics,
        tags=tags,
        **kwargs,
    )
    return folder


def save_model(
    model: Any,
    folder: Path,
    *,
    config: SparsityConfig | None = None,
    tokenizer: Any = None,
    report: SparsityReport | None = None,
    metrics: Sequence[Metric] = (),
    tags: Sequence[str] = (),
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    **kwargs: Any,
) -> None:
    """`save_pretrained` with the arguments of `PreTrainedModel.save_pretrained`."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a {type(model).__name__} cannot be saved; wanted a transformers PreTrainedModel. Of a "
            "wrapped model, save the model inside (accelerator.unwrap_model, model.module)."
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # only the adapter is saved then
        PreTrainedModel.save_pretrained(
            model,
            folder,
            is_main_process=is_main_process,
            state_dict=None if state_dict is None else dict(state_dict),
            **kwargs,
        )
        return
    if kwargs.pop("distributed_checkpoint", False):
        raise ValueError(
            "distributed_checkpoint=True is not supported for compressed models: gather the weights "
            "and pass state_dict=."
        )
    _check_not_quantized(model)
    if not is_main_process or (dist.is_initialized() and dist.get_rank() != 0):
        return
    config = with_head_size(config or _config_of(model), model)
    unknown = set(kwargs) - {"save_peft_format", "save_original_format"}  # no meaning here
    if unknown:
        raise TypeError(f"save_pretrained has no argument {', '.join(sorted(unknown))}.")
    state_dict = _tensors_to_store(model, state_dict)
    targets = _targets_by_weight(model, config)
    counts = []
    with replacing(folder, lambda name: is_weight_file(name, variant)) as fresh:
        _write_configs(model, config, fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        writer = ShardWriter(fresh, convert_file_size_to_int(max_shard_size), variant)
        for name, parts, count in _stored_parts(model, state_dict, targets, config):
            writer.add(name, parts)
            if count is not None:
                counts.append(count)
        writer.close(num_parameters(model))
        measured = SparsityReport(tuple(counts), str(config.pattern), num_parameters(model))
        _warn_if_zeros_were_lost(config, measured)
        if report is not None or metrics or needs_card(folder / CARD_NAME, config, measured):
            write_card(fresh / CARD_NAME, model, config, report or measured, metrics, tags)


def _check_not_quantized(model: PreTrainedModel) -> None:
    """Refuse weights that are no plain floats; those of a GGUF file are restored when loaded."""
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    method = getattr(method, "quant_method", None)
    if method is not None and method != QuantizationMethod.GGUF:
        raise ValueError(
            f"the model is quantized with {getattr(method, 'value', method)}, but zeros are stored "
            "as floats. Load it without quantization, or call model.dequantize() first."
        )


def _config_of(model: PreTrainedModel) -> SparsityConfig:
    """What the model was loaded or pruned with, or else what is measured."""
    recorded = getattr(model.config, "sparsity_config", None)
    if recorded is not None:
        return SparsityConfig.from_dict(recorded)
    return SparsityConfig("unstructured", min(measure_sparsity(model).sparsity, 0.999999))


def _tensors_to_store(
    model: PreTrainedModel, state_dict: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The state dict without tied weights."""
    own = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        own.pop(name, None)
    own = remove_tied_weights_from_state_dict(own, model)
    if state_dict is None:
        return own
    if missing := sorted(own.keys() - state_dict.keys()):
        raise ValueError(
            f"state_dict lacks {len(missing)} of {len(own)} weights of {type(model).__name__}, first "
            f"{missing[0]!r}; it has {next(iter(state_dict), 'nothing')!r}. Remove what a wrapper "
            "put before the names, and give all weights."
        )
    return remove_tied_weights_from_state_dict(dict(state_dict), model)


def _stored_parts(
    model: PreTrainedModel,
    state_dict: dict[str, Tensor],
    targets: Mapping[str, TargetLayer],
    config: SparsityConfig,
) -> Iterator[tuple[str, dict[str, Tensor], TensorSparsity | None]]:
    """The name, parts and, for targets, counts of every tensor; empties the state dict."""
    dense = {}
    for name in list(state_dict):
        tensor, count = _load_offloaded(model, name, state_dict.pop(name)), None
        parts = {"": tensor}
        if name in targets:
            parts, count = _compress(name, tensor, targets[name], config)
        if config.format == "dense":
            dense[name] = tensor
            parts = {}
        yield name, parts, count
    # Other programs want the names of the original checkpoint.
    for name, tensor in revert_weight_conversion(model, dense).items() if dense else ():
        yield name, {"": tensor}, None


def _load_offloaded(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """Read a weight that `device_map` left on the disk."""
    return load_offloaded_parameter(model, name) if tensor.device.type == "meta" else tensor


def _targets_by_weight(model: PreTrainedModel, config: SparsityConfig) -> dict[str, TargetLayer]:
    """The target layers, under every name that their weights have in the state dict."""
    layers = {id(layer.module.weight): layer for layer in target_layers(model, config)}
    return {
        name: layers[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in layers
    }


def _compress(
    name: str, tensor: Tensor, layer: TargetLayer, config: SparsityConfig
) -> tuple[dict[str, Tensor], TensorSparsity]:
    pattern, weight = config.pattern, tensor.T if layer.transposed else tensor
    try:
        parts = compress(tensor, config.format, pattern, transposed=layer.transposed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not isinstance(pattern, NM) or "nm" in parts:
        return parts, TensorSparsity(
            name, (weight.shape[0], weight.shape[1]), tensor.numel() - num_nonzeros(parts), 0
        )
    count = count_zeros(name, weight, pattern)
    if count.violations:
        raise ValueError(
            f"{name}: {count.violations} groups have more than {pattern.n} nonzeros in {pattern.m}, "
            f"but the config promises pattern '{pattern}'. Prune the model to it again, or save with "
            f'config=SparsityConfig("unstructured", sparsity={count.sparsity:.2f}).'
        )
    return parts, count


def _warn_if_zeros_were_lost(config: SparsityConfig, measured: SparsityReport) -> None:
    if measured.sparsity < config.sparsity - _LOST_SPARSITY:
        warnings.warn(
            f"the model is saved with sparsity {measured.sparsity:.4f}, but its config promises "
            f"{config.sparsity:.4f}: training without a mask fills zeros. Prune it again to "
            "restore them.",
            stacklevel=4,
        )


def _write_configs(model: PreTrainedModel, config: SparsityConfig, folder: Path) -> None:
    """Write `config.json`, the generation config, and the stub for `trust_remote_code`."""
    if config.format == "dense":
        model_config = _dense_config(model)
    else:
        model_config = _sparse_config(model, config)
        config_class = type(model_config).__name__
        model_config.auto_map = {"AutoConfig": f"{STUB_NAME.removesuffix('.py')}.{config_class}"}
        (folder / STUB_NAME).write_text(
            '"""This checkpoint is compressed by hf_sparse: pip install hf_sparse"""\n\n'
            f'from hf_sparse import {config_class}\n\n__all__ = ["{config_class}"]\n'
        )
    model_config.dtype = model.dtype
    (folder / "config.json").write_text(model_config.to_json_string())
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _dense_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config under the family's own model type."""
    if not isinstance(model.config, SparseConfigMixin):
        model_config = copy.deepcopy(model.config)
        vars(model_config).pop("quantization_config", None)  # of a GGUF file
        model_config.architectures = [type(model).__name__]
        return model_config
    values = model.config.to_dict()
    for key in ("sparsity_config", "base_model", "auto_map", "quantization_config"):
        values.pop(key, None)
    model_config = base_config_class(model.config.base_model_type).from_dict(values)
    model_config.architectures = [type(model).__name__.removeprefix("Sparse")]
    return model_config


def _sparse_config(model: PreTrainedModel, config: SparsityConfig) -> PreTrainedConfig:
    """The config under the family's sparse model type, with what transformers loads it by."""
    if isinstance(model.config, SparseConfigMixin):
        model_config: PreTrainedConfig = copy.deepcopy(model.config)
    elif model.config.model_type in FAMILIES:
        model_config = CONFIGS[model.config.model_type].from_dict(model.config.to_dict())
    else:
        raise ValueError(
            f"models of type '{model.config.model_type}' have no Sparse class to load a compressed "
            f"checkpoint with; families: {', '.join(FAMILIES)}. Save with format='dense': "
            "SparsityConfig(..., format='dense')."
        )
    model_config.base_model = base_model(model.config)
    name = type(model).__name__.removeprefix("FSDP").removeprefix("Sparse")
    model_config.architectures = [f"Sparse{name}"]
    model_config.quantization_config = SparseCheckpointConfig(**config.to_dict()).to_dict()
    return model_config
