"""What a run keeps of its finished work: each block that is pruned, and the model after each stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_sparse.calibration.walk import BlockStep, Residence
from hf_sparse.checkpoint.save import tensors_to_store
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.files.work_folder import write_work
from hf_sparse.formats.error import FormatError
from hf_sparse.provenance.entry import from_dict, to_dict
from hf_sparse.provenance.record import provenance_of, remember_
from hf_sparse.structure.layers import PRUNED_WITH, by_identity, layers_in
from hf_sparse.structure.targets import Targets


class KeptBlocks(Residence):
    """Blocks in memory; each that is finished is also written to a folder, from which it comes back.

    Args:
        folder: for a file of each block.
        targets: what is pruned.
    """

    def __init__(self, folder: Path, targets: Targets) -> None:
        super().__init__()
        self._folder, self._layers = folder, targets.layers

    def restore(self, step: BlockStep) -> bool:
        file = self._file(step)
        if not file.exists():
            return False
        tensors, _ = read(file)
        parameters = self._parameters(step)
        if tensors.keys() != parameters.keys():
            raise FormatError(f"{file} is damaged. Remove this file, and resume.")
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[name])
        return True

    def finish(self, step: BlockStep) -> None:
        if parameters := self._parameters(step):
            write(self._file(step), {n: p.data for n, p in parameters.items()}, {})

    def _parameters(self, step: BlockStep) -> dict[str, torch.nn.Parameter]:
        groups = by_identity(layers_in(step.block, self._layers)).values()
        return {layers[0].parameter_name: layers[0].parameter for layers in groups}

    def _file(self, step: BlockStep) -> Path:
        return self._folder / f"block-{step.name}.safetensors"


def save_stage(model: Any, work: Path, number: int) -> None:
    """Keep a model as it is after a stage; the single blocks of the stage go."""
    told = {"provenance": to_dict(provenance_of(model))}
    promise: SparsityConfig | None = vars(model).get(PRUNED_WITH)
    if promise is not None:
        told["promise"] = promise.to_dict()
    write(_stage_file(work, number), tensors_to_store(model), told)
    for file in work.glob("block-*.safetensors"):
        file.unlink()


def restore_stages(model: Any, work: Path, count: int) -> int:
    """Give a model the weights of the last finished stage.

    Returns:
        How many stages are finished.

    Raises:
        FormatError: its file is damaged.
    """
    done = [number for number in range(count) if _stage_file(work, number).exists()]
    if not done:
        return 0
    file = _stage_file(work, done[-1])
    tensors, told = read(file)
    own = tensors_to_store(model)
    if own.keys() != tensors.keys():
        raise FormatError(f"{file} is damaged. Remove {work} and start again.")
    for name, tensor in own.items():
        tensor.data.copy_(tensors[name])
    remember_(model, from_dict(told["provenance"]))
    if "promise" in told:
        vars(model)[PRUNED_WITH] = SparsityConfig.from_dict(told["promise"])
    return done[-1] + 1


def _stage_file(work: Path, number: int) -> Path:
    return work / f"stage-{number + 1}.safetensors"


def write(file: Path, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
    """Write tensors and what is told of them so that a kill leaves the whole file, or none.

    Raises:
        OSError: the disk is full, say.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_work(file, plain, {"told": json.dumps(told)})


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` has written.

    Raises:
        FormatError: the file is damaged.
    """
    try:
        with safe_open(file, "pt") as reader:
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
            return tensors, json.loads(reader.metadata()["told"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{file} is damaged ({error}). Remove this file, and resume.") from error
