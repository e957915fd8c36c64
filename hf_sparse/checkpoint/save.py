"""Saving a sparse model: compressed weights, a config that AutoModel finds, and a model card."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.utils import convert_file_size_to_int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from hf_sparse.arguments import check_has_values, check_kinds, check_model, check_saves
from hf_sparse.checkpoint.can_save import check_not_quantized
from hf_sparse.checkpoint.card import CARD_NAME, Card
from hf_sparse.checkpoint.card_file import write_card
from hf_sparse.checkpoint.config_files import write_configs
from hf_sparse.checkpoint.implied import (
    Filled,
    filled_since,
    implied_config,
    of_less,
)
from hf_sparse.checkpoint.overview import Overview, patterns_by_weight
from hf_sparse.checkpoint.source import MetricsWatch, described, write_entry
from hf_sparse.checkpoint.stored_parts import stored_parts
from hf_sparse.checkpoint.writing import (
    ShardWriter,
    check_folder,
    compiled_files,
    is_weight_file,
)
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.counts import SparsityReport, TensorSparsity
from hf_sparse.files.atomic import replacing
from hf_sparse.formats import storage_of
from hf_sparse.patterns import Pattern
from hf_sparse.provenance.record import remember_
from hf_sparse.provenance.values import Metric, Provenance
from hf_sparse.structure.layers import (
    check_has_weights,
    num_parameters,
)
from hf_sparse.structure.promise import Held
from hf_sparse.structure.targets import Targets
from hf_sparse.upstream.peft_by_name import has_adapters
from hf_sparse.upstream.transformers.models import has_own_adapters, not_saved, tied_names
from hf_sparse.upstream.transformers.saving import without_ties

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
    if has_own_adapters(model):  # only the adapter is saved then
        own = None if state_dict is None else dict(state_dict)
        PreTrainedModel.save_pretrained(
            model, folder, is_main_process=is_main_process, state_dict=own, **kwargs
        )
        return None
    _refuse(model, state_dict, kwargs)
    if not is_saving_process(is_main_process):
        return None
    _refuse_unknown(kwargs)
    check_folder(folder, variant)
    known = described(model, report, base_model, card_data, tags)
    plan = _plan(model, config, state_dict, known)
    for told in plan.warnings:
        warnings.warn(told, stacklevel=3)
    watch, old_compiled = MetricsWatch(known, metrics, folder), compiled_files(folder)
    with replacing(
        folder, lambda name: is_weight_file(name, variant) or name in old_compiled
    ) as fresh:
        write_configs(model, plan.targets.config, fresh, known.base_model)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        writer = ShardWriter(fresh, shard_size, variant)
        written = _write(model, plan, writer, watch)
        if written.held.lacks:
            warnings.warn(of_less(written.held.config, written.held), stacklevel=3)
        card, known = _describe(model, plan, written, watch.result(fresh, variant), fresh)
        if warning := write_card(card, fresh / CARD_NAME, folder / CARD_NAME):
            warnings.warn(warning, stacklevel=3)
    remember_(model, known)
    return card.measured.targets


def _refuse(model: Any, state_dict: Mapping[str, Tensor] | None, kwargs: dict[str, Any]) -> None:
    """Refuse a model that cannot be saved, in every process."""
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


def _refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that `PreTrainedModel.save_pretrained` has not."""
    unknown = set(kwargs) - {"save_peft_format", "save_original_format"}  # no meaning here
    if unknown:
        raise TypeError(f"save_pretrained has no argument {', '.join(sorted(unknown))}.")


@dataclass(frozen=True)
class _Plan:
    """What is to be written.

    Attributes:
        targets: of the config that the model is saved with.
        tensors: the weights by name, without tied ones; each is taken out when it is written.
        patterns: what the weights were pruned to, by name.
        filled: what was lost of the promised zeros, if no config was given.
        left_grid: a warning that weights left the grid that was promised of them.
    """

    targets: Targets
    tensors: dict[str, Tensor]
    patterns: Mapping[str, Pattern]
    filled: Filled | None
    left_grid: str | None = None

    @property
    def warnings(self) -> list[str]:
        """What the caller is to know before anything is written."""
        filled = None if self.filled is None else self.filled.warning
        return [warning for warning in (filled, self.left_grid) if warning is not None]


def _plan(
    model: PreTrainedModel,
    config: SparsityConfig | None,
    state_dict: Mapping[str, Tensor] | None,
    known: Provenance,
) -> _Plan:
    """Choose the config, and find what it is about."""
    stored, filled, left_grid = tensors_to_store(model, state_dict), None, None
    if config is None:
        config, filled, left_grid = implied_config(model, stored)
    targets = Targets.of(model, config)
    patterns = patterns_by_weight(model, targets, known.steps)
    return _Plan(targets, stored, patterns, filled, left_grid)


@dataclass
class _Written:
    """What was found in the weights while they were written.

    Attributes:
        held: the zeros of the targets, against what the config asks for.
        counts: of the targets.
        others: counts of the other matrices of the blocks.
        other_zeros: the zeros of all that is no target.
        formats: how many targets are stored in each, and by codes of how many bits.
    """

    held: Held
    counts: list[TensorSparsity] = field(default_factory=list)
    others: list[TensorSparsity] = field(default_factory=list)
    other_zeros: int = 0
    formats: Counter[str] = field(default_factory=Counter)


def _write(
    model: PreTrainedModel, plan: _Plan, writer: ShardWriter, watch: MetricsWatch
) -> _Written:
    """Write all weights."""
    written = _Written(Held(plan.targets.config))
    count = len(plan.tensors)  # each is taken out when it is written
    parts = stored_parts(model, plan.targets, plan.tensors, plan.patterns, written.held, watch)
    for part in tqdm(parts, desc="Saving", total=count):
        writer.add(part.name, part.parts)
        written.other_zeros += part.other_zeros
        written.counts += part.targets
        written.others += part.others
        if part.targets:
            written.formats[storage_of(part.parts)] += 1
    writer.close(num_parameters(model))
    return written


def _describe(
    model: PreTrainedModel, plan: _Plan, written: _Written, known: Provenance, fresh: Path
) -> tuple[Card, Provenance]:
    """Write what was counted in the weights into `config.json`, and make the card."""
    config, filled, held = plan.targets.config, plan.filled, written.held
    if held.promise != config:
        if held.lacks:
            filled = filled_since(model, held)
        config = held.promise
        write_configs(model, config, fresh, known.base_model)
    if filled is not None:
        known = known.with_filled_zeros(filled.promised, filled.found)
    write_entry(fresh, known)
    measured = SparsityReport(
        tuple(written.counts),
        str(config.pattern),
        num_parameters(model),
        notes=held.notes(),
        other_zeros=written.other_zeros,
    )
    overview = Overview.of(measured, written.others, plan.patterns)
    return Card(model, config, overview, written.formats, known), known


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
    for name in not_saved(model):
        own.pop(name, None)
    for name, source in tied_names(model).items():
        if {name, source} <= own.keys() and own[name].device.type == "meta":
            del own[name]  # weights on the disk share no memory by which ties would show
    try:
        own = without_ties(own, model)
    except RuntimeError as error:  # transformers' own, of weights that the class does not tie
        shared = ", ".join(_shared(own)) or str(error)
        raise ValueError(
            f"weights of this {type(model).__name__} are one in memory, and its class does not tie "
            f"them: {shared}. A checkpoint cannot tell that. Give each its own memory, such as "
            "layer.weight = nn.Parameter(layer.weight.clone()), and prune again."
        ) from error
    if state_dict is None:
        return own
    if missing := sorted(own.keys() - state_dict.keys()):
        raise ValueError(
            f"state_dict lacks {len(missing)} of {len(own)} weights of {type(model).__name__}, first "
            f"{missing[0]!r}; it has {next(iter(state_dict), 'nothing')!r}. Remove what a wrapper "
            "put before the names, and give all weights."
        )
    return without_ties(state_dict, model)


def _shared(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors of which others share the memory."""
    places: dict[tuple[str, int], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.device.type != "meta" and tensor.numel():
            places.setdefault((str(tensor.device), tensor.data_ptr()), []).append(name)
    return [name for names in places.values() if len(names) > 1 for name in names]
