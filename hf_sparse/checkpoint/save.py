"""Saving a sparse model: compressed weights, a config that AutoModel finds, and a model card."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.utils import convert_file_size_to_int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hf_sparse.arguments import check_has_values, check_kinds, check_model, check_path, check_saves
from hf_sparse.checkpoint.atomic import replacing
from hf_sparse.checkpoint.can_save import check_not_quantized
from hf_sparse.checkpoint.card import CARD_NAME, Card, write_card
from hf_sparse.checkpoint.config_files import write_configs
from hf_sparse.checkpoint.source import MetricsWatch, described, write_entry
from hf_sparse.checkpoint.writing import (
    ShardWriter,
    check_folder,
    compiled_files,
    is_weight_file,
)
from hf_sparse.configuration_sparse import SparsityConfig, check_config
from hf_sparse.formats import can_compress, compress, format_of, num_nonzeros
from hf_sparse.patterns import NM, Pattern, Unstructured
from hf_sparse.provenance.record import remember_
from hf_sparse.provenance.values import Metric
from hf_sparse.recovery.adapter_checks import is_peft_model
from hf_sparse.recovery.adapters import merged_copy
from hf_sparse.recovery.zeros import SPARSE_FROM
from hf_sparse.report import SparsityReport, TensorSparsity, count_zeros
from hf_sparse.structure import (
    TargetLayer,
    block_layers,
    check_has_weights,
    has_adapters,
    num_parameters,
    promised_config,
    target_layers,
    with_head_size,
)
from hf_sparse.units import shrunk_sizes

_ADAPTERS = (
    "the model has adapters, which a sparse checkpoint does not hold. Merge them "
    "(hf_sparse.merge_adapters), or save it without them (model.delete_adapter); the PeftModel's own "
    "save_pretrained saves the adapter alone."
)


def save_pretrained(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    config: SparsityConfig | None = None,
    *,
    tokenizer: Any = None,
    report: SparsityReport | None = None,
    metrics: Sequence[Metric] = (),
    tags: Sequence[str] = (),
    base_model: str | None = None,
    card_data: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Path:
    """Save a model so that `AutoModel*.from_pretrained(folder)` gives the same weights back.

    Weights of the config's targets are stored compressed, bit for bit (`-0.0` as `0.0`), under
    `model_type: "sparse_..."`; so are other matrices of the blocks that get smaller by it, such as
    those that another pattern was pruned into before. With `format="dense"` the zeros are written
    in place under the family's own type, which loads without hf_sparse. The folder's old files stay
    untouched until the new ones are complete (see `hf_sparse.checkpoint.atomic`).

    Args:
        model: a transformers model. Compressed: of a family in `FAMILIES`. Of a `peft.PeftModel`
            a copy is merged and saved, as `merge_adapters` does it: the zeros stay, and who loads it
            needs no adapter. (Its own `save_pretrained` saves the adapter alone.)
        folder: made if it does not exist. Other files in it stay, but for weights: what
            `save_compiled` wrote there before, and a `pytorch_model.bin`, with a warning. A README.md
            that is no card of hf_sparse stays, with a warning.
        config: pattern, targets and format. None: what the model was pruned with or loaded with,
            or else `unstructured` at the sparsity that is measured.
        tokenizer: saved beside the model if given.
        report: of a step that the model does not remember. It remembers all that was done to it here
            (pruning, sparse training, recovery, merging, shrinking), and what the checkpoint that it
            was loaded from tells.
        metrics: measured figures for the model card. None: those that are known of the model, if its
            weights are still the same.
        tags: for the model card, beside its own.
        base_model: Hub name of the dense model, for the card. None: what is known, or what the model
            was loaded from, if that was no folder.
        card_data: for the metadata of the model card, which the Hub searches by: `license`,
            `license_name`, `license_link`, `language`, `datasets` and `tags`, such as
            `{"license": "apache-2.0", "language": "en"}`. Later saves keep them.
        **kwargs: `max_shard_size` (default `"5GB"`), `state_dict`, `is_main_process` and `variant`
            as in `PreTrainedModel.save_pretrained`. Of several processes the first one saves.

    Returns:
        The folder.

    Memory: beside the model, one shard.

    Raises:
        ValueError: the model's family is not in `FAMILIES`, an adapter without a mask would fill
            zeros, a weight breaks the N:M pattern that `config` promises, the format cannot hold
            it, or the folder holds an ONNX export. Nothing has been written then. (With
            `config=None` a broken N:M promise is a warning, and the model is saved as
            `unstructured`: a Trainer must be able to write its checkpoints.)
        OSError: the folder cannot be written or the disk is full. Nothing has changed then.
    """
    check_path(folder, "save_pretrained")
    if config is not None:
        check_config(config)
    check_kinds(save_pretrained, locals())
    if is_peft_model(model):
        model = merged_copy(model)
    check_model(model, "save_pretrained", PreTrainedModel)
    if getattr(model, "_hf_peft_config_loaded", False) or has_adapters(model):
        raise ValueError(_ADAPTERS)
    folder = Path(folder)
    save_model(
        model,
        folder,
        config=config,
        tokenizer=tokenizer,
        report=report,
        metrics=metrics,
        tags=tags,
        base_model=base_model,
        card_data=card_data,
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
    base_model: str | None = None,
    card_data: Mapping[str, Any] | None = None,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    **kwargs: Any,
) -> SparsityReport | None:
    """`save_pretrained` with the arguments of `PreTrainedModel.save_pretrained`.

    Returns:
        The exact counts of what was saved; None where an adapter was, or another process saves.
    """
    check_model(model, "save_pretrained", PreTrainedModel)
    check_kinds(save_model, locals())
    check_saves(tokenizer, "save_pretrained")
    shard_size = _bytes_of(max_shard_size)
    if getattr(model, "_hf_peft_config_loaded", False):  # only the adapter is saved then
        PreTrainedModel.save_pretrained(
            model,
            folder,
            is_main_process=is_main_process,
            state_dict=None if state_dict is None else dict(state_dict),
            **kwargs,
        )
        return None
    if has_adapters(model):
        raise ValueError(_ADAPTERS)
    if kwargs.pop("distributed_checkpoint", False):
        raise ValueError(
            "distributed_checkpoint=True is not supported for compressed models: gather the weights "
            "and pass state_dict=."
        )
    check_has_weights(model)
    if state_dict is None:
        check_has_values(model, "save_pretrained", offloaded=True)
    check_not_quantized(model)
    if not is_saving_process(is_main_process):
        return None
    unknown = set(kwargs) - {"save_peft_format", "save_original_format"}  # no meaning here
    if unknown:
        raise TypeError(f"save_pretrained has no argument {', '.join(sorted(unknown))}.")

    check_folder(folder, variant)
    known = described(model, report, base_model, card_data, tags)
    stored = tensors_to_store(model, state_dict)
    if config is None:
        config = _implied_config(model, stored)
    config = with_head_size(config, model)
    counts: list[TensorSparsity] = []
    other_zeros = 0
    formats: Counter[str] = Counter()
    old_compiled = compiled_files(folder)
    watch = MetricsWatch(known, metrics, folder)
    with replacing(
        folder, lambda name: is_weight_file(name, variant) or name in old_compiled
    ) as fresh:
        write_configs(model, config, fresh, known.base_model)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        writer = ShardWriter(fresh, shard_size, variant)
        for name, parts, count in _stored_parts(model, stored, config, watch):
            writer.add(name, parts)
            if isinstance(count, TensorSparsity):
                counts.append(count)
                formats[format_of(parts)] += 1
            else:
                other_zeros += count
        writer.close(num_parameters(model))
        measured = SparsityReport(
            tuple(counts), str(config.pattern), num_parameters(model), other_zeros=other_zeros
        )
        _warn_if_zeros_were_lost(config, measured)
        known = watch.result(fresh, variant)
        write_entry(fresh, known)
        card = Card(model, config, measured, formats, known)
        write_card(card, fresh / CARD_NAME, folder / CARD_NAME)
    remember_(model, known)
    return measured


def _bytes_of(max_shard_size: int | str) -> int:
    """The size of a shard in bytes, from a number or a text such as `"5GB"`."""
    try:
        size = int(convert_file_size_to_int(max_shard_size))
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(
            f"max_shard_size is {max_shard_size!r}; wanted a size such as '5GB' or '200MB', or a "
            "number of bytes >= 1."
        )
    return size


def is_saving_process(is_main_process: bool) -> bool:
    """Whether this process, of several, is the one that saves."""
    return is_main_process and not (dist.is_initialized() and dist.get_rank() != 0)


def _implied_config(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> SparsityConfig:
    """What the model was pruned or loaded with, as far as it still holds; else what is measured."""
    promised = promised_config(model)
    if promised is not None and not isinstance(promised.pattern, NM):
        return promised
    targets, ignore = (None, None) if promised is None else (promised.targets, promised.ignore)
    pattern: Pattern = Unstructured() if promised is None else promised.pattern
    layers = _targets_by_weight(model, SparsityConfig("unstructured", 0.0, targets, ignore))
    counts = []
    for name in layers.keys() & stored.keys():
        tensor = _load_offloaded(model, name, stored[name])
        counts.append(count_zeros(name, tensor.T if layers[name].transposed else tensor, pattern))
    found = SparsityReport(tuple(counts), str(pattern), num_parameters(model))
    if promised is None and shrunk_sizes(model) is None and not any(map(_is_sparse, counts)):
        # A dense model: it is to load with transformers alone, though its class be a Sparse one.
        return SparsityConfig("unstructured", 0.0, targets, ignore, "dense")
    if promised is not None and not found.violations:
        return promised
    format = "auto"
    if promised is not None:
        format = "auto" if promised.format == "nm" else promised.format
        warnings.warn(
            f"the model was {promised.pattern}, but {found.violations} groups have more nonzeros now: "
            "training without a mask fills zeros. It is saved as 'unstructured', with sparsity "
            f"{found.sparsity:.4f}.",
            stacklevel=4,
        )
    sparsity = min(found.sparsity, 0.999999)  # a config promises less than 1
    return SparsityConfig("unstructured", sparsity, targets, ignore, format)


def _is_sparse(count: TensorSparsity) -> bool:
    return count.sparsity >= SPARSE_FROM


def tensors_to_store(
    model: PreTrainedModel, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The state dict without tied weights."""
    own = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        own.pop(name, None)
    for name, source in model.all_tied_weights_keys.items():
        if {name, source} <= own.keys() and own[name].device.type == "meta":
            del own[name]  # weights on the disk share no memory by which ties would show
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
    config: SparsityConfig,
    watch: MetricsWatch,
) -> Iterator[tuple[str, dict[str, Tensor], TensorSparsity | int]]:
    """The name and parts of every tensor, with a target's counts or another weight's zeros.

    Other matrices of the blocks, which an earlier pruning may have left zeros in, are compressed
    where that is smaller. Empties the state dict.
    """
    targets = _targets_by_weight(model, config)
    blocks = {id(layer.parameter) for layer in block_layers(model)}
    others = dict(model.named_parameters(remove_duplicate=False))
    dense = {}
    for name in list(state_dict):
        tensor = _load_offloaded(model, name, state_dict.pop(name))
        watch.add(name, tensor)
        parts = {"": tensor}
        count: TensorSparsity | int = 0
        if name in targets:
            parts, count = _compress(name, tensor, targets[name], config)
        elif name in others:
            count = int((tensor == 0).sum())
            if count and id(others[name]) in blocks and can_compress(tensor):
                parts = compress(tensor)
        if config.format == "dense":
            dense[name] = tensor
            parts = {}
        yield name, parts, count
    # Other programs want the names of the original checkpoint.
    for name, tensor in revert_weight_conversion(model, dense).items() if dense else ():
        yield name, {"": tensor}, 0


def _load_offloaded(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """Read a weight that `device_map` left on the disk."""
    return load_offloaded_parameter(model, name) if tensor.device.type == "meta" else tensor


def _targets_by_weight(model: PreTrainedModel, config: SparsityConfig) -> dict[str, TargetLayer]:
    """The target layers, under every name that their weights have in the state dict."""
    layers = {id(layer.parameter): layer for layer in target_layers(model, config)}
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
    if measured.has_lost_zeros(config.sparsity):
        warnings.warn(
            f"the model is saved with sparsity {measured.sparsity:.4f}, but its config promises "
            f"{config.sparsity:.4f}: training without a mask fills zeros. Prune it again to "
            "restore them.",
            stacklevel=4,
        )
