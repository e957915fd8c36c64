"""Blocks whose weights stay on the disk between their turns, and are written when they are pruned."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from hf_sparse.arguments import check_finite
from hf_sparse.calibration.walk import BlockStep, Residence
from hf_sparse.calibration.windows import fingerprint
from hf_sparse.checkpoint.reading import (
    StoredTensor,
    open_file,
    read_headers,
    read_parts,
    restore_state_dict,
)
from hf_sparse.counts import TensorSparsity, count_zeros
from hf_sparse.files.work_folder import write_work
from hf_sparse.formats import FormatError, compress, decompress, join, locate
from hf_sparse.patterns import Unstructured
from hf_sparse.pruning.problem import Notes
from hf_sparse.quantization import rounded
from hf_sparse.structure.grids import Gridded
from hf_sparse.structure.layers import TargetLayer, by_identity, layers_in
from hf_sparse.structure.targets import Targets
from hf_sparse.upstream.accelerate import files_of, hook_of, read_through_

_EMBEDDINGS = "embeddings.safetensors"


class OnDisk(Residence):
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
        self._weights = read_through_(model, _Weights)
        self.counts: dict[str, TensorSparsity] = {}
        self.earlier_notes: tuple[str, ...] = ()

    def files(self, converted: Path) -> set[Path]:
        """The files of the source.

        Args:
            converted: the folder of weights that were converted while they were loaded, which are no
                files of the source; those that they were made from lie beside the source's others.
        """
        files = files_of(self._weights.source)
        own = {file for file in files if file.parent != converted}
        if own == files:
            return own
        return own | {file for one in own for file in one.parent.glob("*.safetensors")}

    @property
    def all_notes(self) -> tuple[str, ...]:
        """The notes of the run that is resumed, and of this one."""
        return (*self.earlier_notes, *self._notes.lines())

    @contextmanager
    def placed(self, block: nn.Module) -> Iterator[None]:
        with self._in_memory(block):
            for layer in layers_in(block, self._layers):
                check_finite(layer.weight_name, layer.weight)
            yield

    @contextmanager
    def entered(self, model: nn.Module) -> Iterator[None]:
        """Some families send tokens to the device of the embeddings, which must not be `meta` then."""
        try:
            embeddings = model.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):  # of a model of other inputs than tokens
            embeddings = None
        if embeddings is None or id(embeddings) not in self._names:
            yield
            return
        with self._in_memory(embeddings):
            yield

    @contextmanager
    def running(self, block: nn.Module) -> Iterator[None]:
        """Some families call methods of modules other than forward, which bring no weights in."""
        with ExitStack() as parts:
            for part in block.children():  # the block's own forward is being recorded
                parts.enter_context(self._in_memory(part))
            yield

    @contextmanager
    def _in_memory(self, part: nn.Module) -> Iterator[None]:
        """A part of the model with its weights, which are freed at the end."""
        modules = list(part.modules())
        hooks = {module: hook for module in modules if (hook := hook_of(module)) is not None}
        remove_hook_from_module(part, recurse=True)
        prefix = self._names[id(part)]
        for name, parameter in list(part.named_parameters()):
            if parameter.device.type == "meta":
                value = self._weights.source[f"{prefix}.{name}"]
                set_module_tensor_to_device(part, name, "cpu", value, dtype=parameter.dtype)
        try:
            yield
        finally:
            for module, hook in hooks.items():
                add_hook_to_module(module, hook)  # frees the weights

    def restore(self, step: BlockStep) -> bool:
        file = self._file(step)
        if not file.exists():
            return False
        held = self._parameters(step)
        with open_file(file) as reader:
            run = (reader.metadata() or {}).get("run")
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        known = {} if run is None else json.loads(run)
        if known.get("sha256") != fingerprint([tensors]) or [
            count["name"] for count in known["counts"]
        ] != [layer.weight_name for layers in held for layer in layers]:
            raise FormatError(f"{file} is damaged. Remove this file, and resume.")
        self._publish(file, known["counts"])
        self.earlier_notes = tuple(known["notes"])
        weights = restore_state_dict(tensors)
        for layers in held:
            layers[0].parameter.data.copy_(weights[layers[0].parameter_name])
        return True

    def finish(self, step: BlockStep) -> None:
        tensors, counts = {}, []
        for layers in self._parameters(step):
            name, stored = layers[0].parameter_name, layers[0].parameter.data
            parts = compress(stored, "auto", self._pattern, transposed=layers[0].transposed)
            tensors.update(
                {join(name, part): tensor.contiguous() for part, tensor in parts.items()}
            )
            for layer in layers:
                counts.append(asdict(count_zeros(layer.weight_name, layer.weight, self._pattern)))
        file = self._file(step)
        run = {
            "counts": counts,
            "notes": self.all_notes,
            "sha256": fingerprint([tensors]),
        }
        write_work(file, tensors, {"run": json.dumps(run)})
        self._publish(file, counts)

    def round(self, layers: Iterable[Gridded]) -> None:
        """Round weights outside the blocks to their grids, and read them from the work folder then.

        Args:
            layers: weights that no block holds, and their grids.
        """
        tensors = {}
        for layer, grid in layers:
            name, parameter = layer.parameter_name, layer.parameter
            found = rounded(self._weights.source[name].to(parameter.dtype), grid)
            parts = compress(found, "auto", Unstructured())
            tensors.update({join(name, part): one.contiguous() for part, one in parts.items()})
        if tensors:
            file = self.work / _EMBEDDINGS
            write_work(file, tensors)
            self._publish(file, [])

    def _parameters(self, step: BlockStep) -> list[tuple[TargetLayer, ...]]:
        """The layers of a block that are pruned, by the parameters that hold them."""
        return list(by_identity(layers_in(step.block, self._layers)).values())

    def _publish(self, file: Path, counts: list[dict[str, Any]]) -> None:
        self._weights.pruned.update({stored.name: stored for stored in read_headers([file])})
        for count in counts:
            self.counts[count["name"]] = TensorSparsity(**{**count, "shape": tuple(count["shape"])})

    def _file(self, step: BlockStep) -> Path:
        return self.work / f"{step.name}.safetensors"


class _Weights(Mapping[str, Tensor]):
    """The weights of the model by name: of finished blocks the pruned ones, of others the source's."""

    def __init__(self, source: Mapping[str, Tensor]) -> None:
        self.source = source
        self.pruned: dict[str, StoredTensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.pruned:
            return self.source[name]
        stored = self.pruned[name]
        parts = read_parts(stored)
        if not stored.compressed:
            return parts[""]
        with locate(stored.place):
            return decompress(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)
