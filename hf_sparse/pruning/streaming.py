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
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_sparse.arguments import check_finite, check_kinds, check_path, check_saves
from hf_sparse.calibration.activations import on_disk
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.walk import BlockStep, Residence
from hf_sparse.calibration.windows import checked_batches, fingerprint
from hf_sparse.checkpoint.can_save import check_can_save
from hf_sparse.checkpoint.promised import check_to_load
from hf_sparse.checkpoint.reading import (
    StoredTensor,
    open_file,
    read_headers,
    read_parts,
    restore_state_dict,
)
from hf_sparse.checkpoint.save import save_model
from hf_sparse.checkpoint.writing import check_not_lost
from hf_sparse.configuration_sparse import SparsityConfig, check_config
from hf_sparse.files.atomic import sync_file
from hf_sparse.files.work_folder import (
    HIDDEN_STATES,
    check_work_folder,
    is_stopped,
    read_json,
    sampled_hash,
    work_folder,
)
from hf_sparse.formats import FormatError, compress, decompress, join, locate
from hf_sparse.provenance.record import record_
from hf_sparse.provenance.values import Calibration, Step
from hf_sparse.pruning.allocation import allocate
from hf_sparse.pruning.loading import dense_model_class
from hf_sparse.pruning.methods import Recipe
from hf_sparse.pruning.oneshot import notes_on
from hf_sparse.pruning.problem import Notes
from hf_sparse.pruning.task import Task
from hf_sparse.report import SparsityReport, TensorSparsity, count_zeros
from hf_sparse.structure.layers import (
    layers_in,
    layers_outside,
    num_parameters,
)
from hf_sparse.structure.targets import Targets
from hf_sparse.version import __version__

_SHARD_SIZE = "250MB"


@contextmanager
def _expected_on_disk() -> Iterator[None]:
    """Keep back accelerate's warning that weights stay on the disk: that is what is wanted here."""

    def other(record: logging.LogRecord) -> bool:
        return "offloaded to the disk" not in record.getMessage()

    logger = logging.getLogger("accelerate.big_modeling")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


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
        config: pattern, sparsity and targets, all of them in the blocks.
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
    model itself.

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
    known = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; wanted 'auto' or a type such as 'bfloat16'.")
    folder, source = Path(os.path.abspath(folder)), str(source)
    recipe, asked = check_run(source, folder, config, method, options, resume)
    check_to_load(source)
    described = AutoConfig.from_pretrained(source)
    check_can_save(described, folder, config)
    if not overwrite and not (resume and is_stopped(folder)):
        check_not_lost(folder)
    model = _load(source, described, dtype)
    check_can_save(model, folder, config)
    targets = Targets.of(model, config)
    _check_in_blocks(targets)
    inputs = checked_batches(batches, model, method)
    start = time.perf_counter()
    residence = _OnDisk(model, targets, notes := Notes())
    run = {**asked, **_described(model, residence.files, inputs)}
    with work_folder(folder, run, resume=resume) as work:
        residence.work = work
        task = Task(
            model,
            targets,
            inputs,
            notes=notes,
            residence=residence,
            store=on_disk(work / HIDDEN_STATES),
        )
        with switched(model, training=False, use_cache=False):
            task.sparsities = _sparsities(work, recipe, task)
            recipe.prune(task)
        report = SparsityReport(
            tuple(residence.counts[layer.weight_name] for layer in targets.layers),
            str(targets.pattern),
            num_parameters(model),
            method,
            recipe.all_options,
            time.perf_counter() - start,
            (*residence.earlier_notes, *notes.lines(), *notes_on(targets)),
        )
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
    if saved is None:
        return report
    notes_of_both = (*report.notes, *saved.notes)
    return replace(report, other_zeros=saved.other_zeros, notes=notes_of_both)


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


def _load(source: str, described: PreTrainedConfig, dtype: str | torch.dtype) -> PreTrainedModel:
    """The model with its weights left on the disk, all of them."""
    with _expected_on_disk():
        model, info = dense_model_class(source, described).from_pretrained(
            source, device_map={"": "disk"}, dtype=dtype, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):
        raise FormatError(
            f"{source} lacks {len(missing)} weights of the {type(model).__name__} that its config.json "
            f"names, first {missing[0]}: they would be random. Copy or download it again."
        )
    return model  # type: ignore[no-any-return]


def _check_in_blocks(targets: Targets) -> None:
    if outside := layers_outside(targets.stacks, targets.layers):
        raise ValueError(
            f"{outside[0].name} is outside the blocks, and only blocks are streamed. Leave it out, or "
            "prune the model in memory with prune_."
        )


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
        found = allocate(recipe.composition.allocation, task)
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(found))
        sync_file(fresh)
        fresh.replace(file)
    known: dict[str, float] = read_json(file)
    if known.keys() != {layer.name for layer in task.layers}:
        raise ValueError(
            f"{file} does not tell the sparsity of every layer. Remove it, and resume."
        )
    return known


class _Weights(Mapping[str, Tensor]):
    """The weights of the model by name: of finished blocks the pruned ones, of others the source's."""

    def __init__(self, source: Mapping[str, Tensor]) -> None:
        self.source = source
        self.pruned: dict[str, StoredTensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.pruned:
            return self.source[name]
        stored = self.pruned[name]
        with locate(stored.place):
            return decompress(read_parts(stored))

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)


class _OnDisk(Residence):
    """Blocks whose weights are read from the disk for their turn, and written when pruned.

    Attributes:
        counts: of each pruned weight, by its name.
        earlier_notes: of the run that is resumed.
        work: the folder for finished blocks.
    """

    def __init__(self, model: nn.Module, targets: Targets, notes: Notes) -> None:
        super().__init__()
        self._layers, self._pattern, self._notes = targets.layers, targets.pattern, notes
        self.work = Path()
        self._names = {id(module): name for name, module in model.named_modules()}
        maps = [hook.weights_map for hook in _hooks(model)]
        self._weights = _Weights(maps[0].dataset)
        for weights_map in maps:
            weights_map.dataset = self._weights
        self.counts: dict[str, TensorSparsity] = {}
        self.earlier_notes: tuple[str, ...] = ()

    @property
    def files(self) -> set[Path]:
        """The files of the source."""
        source: Any = self._weights.source
        return {Path(place["safetensors_file"]) for place in source.index.values()}

    @contextmanager
    def placed(self, block: nn.Module) -> Iterator[None]:
        hooks = {
            module: module._hf_hook for module in block.modules() if hasattr(module, "_hf_hook")
        }
        remove_hook_from_module(block, recurse=True)
        prefix = self._names[id(block)]
        for name, parameter in list(block.named_parameters()):
            if parameter.device.type == "meta":
                value = self._weights.source[f"{prefix}.{name}"]
                set_module_tensor_to_device(block, name, "cpu", value, dtype=parameter.dtype)
        for layer in layers_in(block, self._layers):
            check_finite(layer.weight_name, layer.weight)
        try:
            yield
        finally:
            for module, hook in hooks.items():
                add_hook_to_module(module, hook)  # frees the weights

    def restore(self, step: BlockStep) -> bool:
        file = self._file(step)
        if not file.exists():
            return False
        layers = layers_in(step.block, self._layers)
        with open_file(file) as reader:
            run = (reader.metadata() or {}).get("run")
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        known = {} if run is None else json.loads(run)
        if known.get("sha256") != fingerprint([tensors]) or [
            count["name"] for count in known["counts"]
        ] != [layer.weight_name for layer in layers]:
            raise FormatError(f"{file} is damaged. Remove this file, and resume.")
        self._publish(file, known["counts"])
        self.earlier_notes = tuple(known["notes"])
        weights = restore_state_dict(tensors)
        for layer in layers:
            layer.parameter.data.copy_(weights[layer.weight_name])
        return True

    def finish(self, step: BlockStep) -> None:
        tensors, counts = {}, []
        for layer in layers_in(step.block, self._layers):
            name = layer.weight_name
            parts = compress(
                layer.parameter.data, "auto", self._pattern, transposed=layer.transposed
            )
            tensors.update(
                {join(name, part): tensor.contiguous() for part, tensor in parts.items()}
            )
            counts.append(asdict(count_zeros(name, layer.weight, self._pattern)))
        file = self._file(step)
        fresh = file.with_suffix(".new")
        run = {
            "counts": counts,
            "notes": [*self.earlier_notes, *self._notes.lines()],
            "sha256": fingerprint([tensors]),
        }
        try:
            save_file(tensors, fresh, {"run": json.dumps(run)})
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(
                f"{file} cannot be written: {error}. Finished blocks are kept: free space, and resume."
            ) from error
        sync_file(fresh)
        fresh.replace(file)
        self._publish(file, counts)

    def _publish(self, file: Path, counts: list[dict[str, Any]]) -> None:
        self._weights.pruned.update({stored.name: stored for stored in read_headers([file])})
        for count in counts:
            self.counts[count["name"]] = TensorSparsity(**{**count, "shape": tuple(count["shape"])})

    def _file(self, step: BlockStep) -> Path:
        return self.work / f"{step.name}.safetensors"


def _hooks(model: nn.Module) -> Iterator[Any]:
    """The hooks of Accelerate that bring weights in."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            if getattr(part, "weights_map", None) is not None:
                yield part
