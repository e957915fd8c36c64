"""Saving a sparse model: compressed weights, a config that AutoModel finds, and a model card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.utils import convert_file_size_to_int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hf_sparse.arguments import check_has_values, check_kinds, check_model, check_saves
from hf_sparse.checkpoint.can_save import check_not_quantized
from hf_sparse.checkpoint.card import CARD_NAME, Card, write_card
from hf_sparse.checkpoint.config_files import write_configs
from hf_sparse.checkpoint.implied import (
    Filled,
    implied_config,
    load_offloaded,
    targets_by_weight,
    warn_of_less,
)
from hf_sparse.checkpoint.overview import Overview, count_other, patterns_by_weight
from hf_sparse.checkpoint.source import MetricsWatch, described, write_entry
from hf_sparse.checkpoint.writing import (
    ShardWriter,
    check_folder,
    compiled_files,
    is_weight_file,
)
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.files.atomic import replacing
from hf_sparse.formats import FORMATS, can_compress, compress, format_of, num_nonzeros
from hf_sparse.patterns import Pattern
from hf_sparse.provenance.record import remember_
from hf_sparse.provenance.values import Metric
from hf_sparse.report import SparsityReport, TensorSparsity, count_zeros
from hf_sparse.structure.layers import (
    TargetLayer,
    block_layers,
    check_has_weights,
    has_adapters,
    num_parameters,
    promised_config,
    with_head_size,
)
from hf_sparse.structure.promise import Held, with_sparsity

ADAPTERS = (
    "the model has adapters, which a sparse checkpoint does not hold. Merge them "
    "(hf_sparse.merge_adapters_), or save it without them (model.delete_adapter); the PeftModel's own "
    "save_pretrained saves the adapter alone."
)


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
        raise ValueError(ADAPTERS)
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
    given = config
    known = described(model, report, base_model, card_data, tags)
    stored = tensors_to_store(model, state_dict)
    filled = None
    if given is None:
        config, filled = implied_config(model, stored)
    else:
        config = with_head_size(given, model)
    held, patterns = Held(config), patterns_by_weight(model, config, known.steps)
    counts: list[TensorSparsity] = []
    others: list[TensorSparsity] = []
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
        for part in _stored_parts(model, stored, held, watch, patterns):
            writer.add(part.name, part.parts)
            other_zeros += part.other_zeros
            if part.is_target:
                counts.append(part.counts[0])
                formats[format_of(part.parts)] += 1
            else:
                others += part.counts
        writer.close(num_parameters(model))
        if held.promise != config:
            if held.lacks:
                warn_of_less(config, held)
                filled = _filled(model, config, held)
            config = held.promise
            write_configs(model, config, fresh, known.base_model)
        measured = SparsityReport(
            tuple(counts),
            str(config.pattern),
            num_parameters(model),
            notes=held.notes(),
            other_zeros=other_zeros,
        )
        known = watch.result(fresh, variant)
        if filled is not None:
            known = known.with_filled_zeros(filled.promised, filled.found)
        write_entry(fresh, known)
        card = Card(model, config, Overview.of(measured, others, patterns), formats, known)
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


@dataclass(frozen=True)
class _Stored:
    """One tensor of a checkpoint: its parts, and what was counted in it.

    Attributes:
        counts: those of a target, or of another matrix of the blocks; else none.
        other_zeros: the zeros of a weight that is no target.
    """

    name: str
    parts: dict[str, Tensor]
    counts: tuple[TensorSparsity, ...] = ()
    is_target: bool = False
    other_zeros: int = 0


def _stored_parts(
    model: PreTrainedModel,
    state_dict: dict[str, Tensor],
    held: Held,
    watch: MetricsWatch,
    patterns: Mapping[str, Pattern],
) -> Iterator[_Stored]:
    """Every tensor with its parts and counts.

    Other matrices of the blocks, which an earlier pruning may have left zeros in, are compressed
    where that is smaller. Empties the state dict.
    """
    config = held.config
    targets = targets_by_weight(model, config)
    blocks = {id(layer.parameter): layer for layer in block_layers(model)}
    others = dict(model.named_parameters(remove_duplicate=False))
    dense = {}
    for name in list(state_dict):
        tensor = load_offloaded(model, name, state_dict.pop(name))
        watch.add(name, tensor)
        stored = _Stored(name, {"": tensor})
        if name in targets:
            layer = targets[name]
            parts, count = _compress(name, tensor, layer, config)
            held.add(name, tensor.T if layer.transposed else tensor)
            stored = _Stored(name, parts, (count,), True)
        elif name in others:
            zeros = int((tensor == 0).sum())
            stored = replace(stored, other_zeros=zeros)
            if (block := blocks.get(id(others[name]))) is not None:
                weight = tensor.T if block.transposed else tensor
                stored = replace(stored, counts=(count_other(name, weight, patterns),))
                if zeros and can_compress(tensor):
                    stored = replace(stored, parts=compress(tensor))
        if config.format == "dense":
            dense[name] = tensor
            stored = replace(stored, parts={})
        yield stored
    # Other programs want the names of the original checkpoint.
    for name, tensor in revert_weight_conversion(model, dense).items() if dense else ():
        yield _Stored(name, {"": tensor})


def _filled(model: PreTrainedModel, config: SparsityConfig, held: Held) -> Filled | None:
    """What a model has lost, where it was pruned or loaded with what it is now saved as."""
    promised = promised_config(model)
    if promised is None or with_sparsity(config, 0.0) != with_sparsity(promised, 0.0):
        return None
    lost = held.is_less_than(promised.sparsity)
    return Filled(promised.sparsity, held.share) if lost else None


def _compress(
    name: str, tensor: Tensor, layer: TargetLayer, config: SparsityConfig
) -> tuple[dict[str, Tensor], TensorSparsity]:
    pattern, weight = config.pattern, tensor.T if layer.transposed else tensor
    try:
        parts = compress(tensor, config.format, pattern, transposed=layer.transposed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if pattern.implied_sparsity is None or FORMATS[format_of(parts)].proves(pattern):
        return parts, TensorSparsity(
            name, (weight.shape[0], weight.shape[1]), tensor.numel() - num_nonzeros(parts), 0
        )
    count = count_zeros(name, weight, pattern)
    if count.violations:
        raise ValueError(
            f"{name}: {count.violations} groups {pattern.violation}, but the config promises pattern "
            f"'{pattern}'. Prune the model to it again, or save with "
            f'config=SparsityConfig("unstructured", sparsity={count.sparsity:.2f}).'
        )
    return parts, count
