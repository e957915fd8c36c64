"""Pruning a checkpoint that is larger than memory, block by block, from its shards.

The model is loaded with all weights left on the disk (Accelerate's offloading). A block gets its
weights for its turn alone; when it is pruned they are written, compressed, to a file of the work
folder beside the output, and from then on read from there. At the end `save_pretrained` reads every
tensor where it is and writes the sparse checkpoint.

The work folder is also what a killed run leaves: `resume=True` takes finished blocks from it, takes
the calibration data through them again, and goes on with the first that is not finished. Since a
block's result follows from its inputs alone, it is the same bit for bit.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_sparse.arguments import check_kinds, check_path, check_saves
from hf_sparse.calibration.activations import on_disk
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.windows import checked_batches, fingerprint
from hf_sparse.checkpoint.can_save import check_can_save
from hf_sparse.checkpoint.dense_models import dense_model_class, restored
from hf_sparse.checkpoint.promised import check_to_load
from hf_sparse.checkpoint.save import save_model
from hf_sparse.checkpoint.writing import check_not_lost
from hf_sparse.configuration_sparse import SparsityConfig, check_config
from hf_sparse.counts import SparsityReport
from hf_sparse.files.atomic import sync_file
from hf_sparse.files.work_folder import (
    CONVERTED,
    HIDDEN_STATES,
    check_work_folder,
    describe_run,
    is_stopped,
    read_json,
    sampled_hash,
    work_folder,
)
from hf_sparse.formats import FormatError
from hf_sparse.provenance.record import record_
from hf_sparse.provenance.values import Calibration, Step
from hf_sparse.pruning.allocation import layer_sparsities
from hf_sparse.pruning.methods import Recipe
from hf_sparse.pruning.on_disk import OnDisk
from hf_sparse.pruning.oneshot import notes_on
from hf_sparse.pruning.problem import Notes
from hf_sparse.pruning.task import Task
from hf_sparse.pruning.uniform import check_uniform
from hf_sparse.structure.grids import gridded
from hf_sparse.structure.layers import layers_outside, num_parameters
from hf_sparse.structure.targets import Targets
from hf_sparse.upstream.accelerate import expecting_weights_on_disk
from hf_sparse.version import __version__

_SHARD_SIZE = "250MB"


@torch.no_grad()
def prune_checkpoint(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    config: SparsityConfig,
    method: str = "wanda",
    batches: Iterable[Mapping[str, Tensor] | Tensor] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "auto",
    base_model: str | None = None,
    **options: Any,
) -> SparsityReport:
    """Prune a dense checkpoint into a sparse one without holding the model in memory.

    Args:
        source: folder or Hub name of the dense model.
        folder: for the sparse model. `<folder>.unfinished` beside it is the work folder: it holds
            the finished blocks and the hidden states of the calibration data, and is removed at
            the end.
        config: pattern, sparsity and targets, all of them in the blocks; and bits, see `prune_`.
        method: one that goes through the blocks: not `magnitude` or `proxsparse`.
        batches: see `prune_`.
        resume: go on with the work folder of a run that was stopped, made with the same arguments.
            Without such a folder the run begins anew.
        overwrite: replace the model that is in `folder`. Files of other names stay. A run that is
            resumed was allowed to when it began.
        tokenizer: saved beside the model if given.
        dtype: of the weights; `"auto"` as they are stored.
        base_model: Hub name of the dense model, for the model card.
        **options: as for `prune_`.

    Returns:
        Exact counts per tensor, with the method, its options and the time (of this run).

    Memory: two blocks, their Gram matrices (in fp64), the activations of one batch, and 1 GB; in other
    words what `prune_` needs for one block, not the model. On the disk: the pruned blocks and the
    hidden states (twice, with `reconstruct` four times, samples x window x hidden_size) beside the
    model itself; and once more the experts of a mixture, where they are stored one by one.

    Raises:
        ValueError: as `prune_`; a method that needs the whole model; a work folder of another run,
            or one that is there without `resume`; files in `folder` without `overwrite`.
        FormatError: the dense model is damaged, or lacks weights.
        OSError: the disk is full. Finished blocks stay in the work folder: free space and resume.
    """
    check_path(source, "prune_checkpoint", "folder of the dense model")
    check_path(folder, "prune_checkpoint")
    check_config(config)
    check_kinds(prune_checkpoint, locals())
    check_saves(tokenizer, "prune_checkpoint")
    _check_dtype(dtype)
    folder, source = Path(os.path.abspath(folder)), str(source)
    recipe, asked = check_run(source, folder, config, method, options, resume)
    check_to_load(source)
    described = AutoConfig.from_pretrained(source)
    check_can_save(described, folder, config)
    if not overwrite and not (resume and is_stopped(folder)):
        check_not_lost(folder)
    with work_folder(folder, asked, resume=resume) as work:
        model = _load(source, described, dtype, work / CONVERTED)
        check_can_save(model, folder, config)
        targets = _targets_in_blocks(model, config, recipe)
        inputs = checked_batches(batches, model, method)
        start = time.perf_counter()
        residence = OnDisk(model, targets, notes := Notes())
        residence.work = work
        run = {**asked, **_described(model, residence.files(work / CONVERTED), inputs)}
        describe_run(work, run)
        task = Task(model, targets, inputs, notes=notes, residence=residence)
        _prune(work, recipe, task, residence)
        seconds = time.perf_counter() - start
        data = Calibration.of(inputs, run["calibration"])
        record_(model, Step.of(method, recipe.all_options, config, data))
        saved = save_model(
            model,
            folder,
            config=targets.config,
            tokenizer=tokenizer,
            base_model=base_model,
            max_shard_size=_SHARD_SIZE,
        )
    report = SparsityReport(
        tuple(residence.counts[layer.weight_name] for layer in targets.layers),
        str(targets.pattern),
        num_parameters(model),
        method,
        recipe.all_options,
        seconds,
        (*residence.all_notes, *notes_on(targets)),
    )
    return report if saved is None else _with_saved(report, saved)


def _prune(work: Path, recipe: Recipe, task: Task, residence: OnDisk) -> None:
    """Prune a task's blocks, with hidden states and sparsities in the work folder.

    What the config puts on a grid outside the blocks is rounded at the end.
    """
    task.store = on_disk(work / HIDDEN_STATES)
    with switched(task.model, training=False, use_cache=False):
        task.sparsities = _sparsities(work, recipe, task)
        recipe.prune(task)
    own = {id(layer.parameter) for layer in task.layers}
    pairs = gridded(task.model, task.targets)
    residence.round((layer, grid) for layer, grid in pairs if id(layer.parameter) not in own)


def _with_saved(report: SparsityReport, saved: SparsityReport) -> SparsityReport:
    """The report of a run, with what only the saved model shows."""
    return replace(report, other_zeros=saved.other_zeros, notes=(*report.notes, *saved.notes))


def _check_dtype(dtype: str | torch.dtype) -> None:
    known = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; wanted 'auto' or a type such as 'bfloat16'.")


def check_run(
    source: str,
    folder: str | os.PathLike[str],
    config: SparsityConfig,
    method: str,
    options: Mapping[str, Any],
    resume: bool,
) -> tuple[Recipe, dict[str, Any]]:
    """Refuse a run that cannot be streamed or resumed, from its arguments alone.

    Args:
        source, folder, config, method, options, resume: see `prune_checkpoint`.

    Returns:
        The recipe, and what a run that goes on with this one must share of the arguments.

    Raises:
        ValueError: a method that needs the whole model, an output that is the source, or a work
            folder of another run, or one that is there without `resume`.
    """
    recipe = Recipe.of(method, config.pattern, options)
    if recipe.method.masks is not None:
        raise ValueError(
            f"method '{method}' looks at all layers at once and cannot stream. Use one that goes "
            "through the blocks, such as 'wanda' or 'sparsegpt', or prune_ in memory."
        )
    if recipe.composition.token_weights:
        raise ValueError(
            "token_weights takes gradients through the whole model and cannot stream. Leave it out, or "
            "prune_ in memory."
        )
    folder = Path(os.path.abspath(folder))
    if folder.resolve() == Path(source).resolve():
        raise ValueError(f"the output is the source, {source}: the dense model would be lost.")
    asked = {
        "hf_sparse": __version__,
        "config": config.to_dict(),
        "method": recipe.name,
        "options": {**recipe.all_options, **asdict(recipe.composition)},
    }
    check_work_folder(folder, asked, resume=resume)
    return recipe, asked


def _load(
    source: str, described: PreTrainedConfig, dtype: str | torch.dtype, converted: Path
) -> PreTrainedModel:
    """The model with its weights left on the disk, all of them.

    Weights that are not stored as the model has them, such as the experts of a mixture each in a tensor
    of its own, or quantized ones that transformers restores, are written to the folder `converted`.
    """
    with expecting_weights_on_disk():
        model, info = dense_model_class(source, described).from_pretrained(
            source,
            device_map={"": "disk"},
            dtype=dtype,
            output_loading_info=True,
            offload_folder=str(converted),
            **restored(source, described),
        )
    if missing := sorted(info["missing_keys"]):
        raise FormatError(
            f"{source} lacks {len(missing)} weights of the {type(model).__name__} that its config.json "
            f"names, first {missing[0]}: they would be random. Copy or download it again."
        )
    return model  # type: ignore[no-any-return]


def _targets_in_blocks(model: PreTrainedModel, config: SparsityConfig, recipe: Recipe) -> Targets:
    """What to prune; what cannot be pruned, or rounded to the config's bits, is refused."""
    targets = Targets.of(model, config)
    if outside := layers_outside(targets.stacks, targets.layers):
        raise ValueError(
            f"{outside[0].name} is outside the blocks, and only blocks are streamed. Leave it out, or "
            "prune the model in memory with prune_."
        )
    check_uniform(model, targets, recipe)
    gridded(model, targets)  # tells of groups that do not divide a weight
    return targets


def _described(
    model: PreTrainedModel, files: set[Path], inputs: list[dict[str, Any]]
) -> dict[str, Any]:
    """What a run must share with the one that it resumes, beside its arguments."""
    return {
        "source": {file.name: sampled_hash(file) for file in sorted(files)},
        "model": json.loads(model.config.to_json_string()),
        "dtype": str(model.dtype),
        "calibration": fingerprint(inputs),
    }


def _sparsities(work: Path, recipe: Recipe, task: Task) -> dict[str, float]:
    """The sparsity of each layer, from the work folder if they are there."""
    file = work / "sparsities.json"
    if not file.exists():
        sparsities = layer_sparsities(recipe.composition.allocation, task)
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(sparsities))
        sync_file(fresh)
        fresh.replace(file)
    known: dict[str, float] = read_json(file)
    if known.keys() != {layer.name for layer in task.layers}:
        raise ValueError(
            f"{file} does not tell the sparsity of every layer. Remove it, and resume."
        )
    return known
