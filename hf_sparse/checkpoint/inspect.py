"""Reading the sparsity of a checkpoint without memory for its model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers.utils.logging import tqdm

from hf_sparse.arguments import check_path
from hf_sparse.checkpoint.bounds import Size
from hf_sparse.checkpoint.candidates import Candidates, candidates_of, dense_model_in
from hf_sparse.checkpoint.index import read_object, read_sparsity
from hf_sparse.checkpoint.on_grids import OnGrid, bits_in_words
from hf_sparse.checkpoint.promised import CONFIG_NAME, QUANT_METHOD, Promised, promised_by
from hf_sparse.checkpoint.reading import (
    StoredTensor,
    check_digests,
    check_is_checkpoint,
    checkpoint_files,
    is_target,
    read_headers,
    read_parts,
    watch,
)
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.counts import SparsityReport, TensorSparsity, count_zeros
from hf_sparse.files.checkpoint_folder import checkpoint_folder
from hf_sparse.formats import CODINGS, FormatError, decompress, locate, num_bytes, read_layout
from hf_sparse.patterns import Pattern, Unstructured
from hf_sparse.structure.layers import TargetLayer, block_layers, by_identity
from hf_sparse.structure.orientation import oriented
from hf_sparse.tables import html_table
from hf_sparse.upstream.transformers.models import tied_names


@dataclass(frozen=True)
class CheckpointSparsity:
    """What a checkpoint holds.

    Attributes:
        config: the `SparsityConfig` in `config.json`; None for a dense checkpoint.
        report: exact counts of the tensors that the config names (the default targets, if it names
            none or the checkpoint is dense; where no model can be made, all matrices in numbered
            blocks), and the zeros of the others.
        formats: the format of each of those tensors, and of all others that are stored compressed.
        stored_bytes: bytes of each of them in the files, headers aside.
        file_bytes: size of all weight files.
        candidates: of a dense checkpoint, what pruning would make sparse; None if transformers cannot
            make its model.
        bits: of each of those tensors that is stored as codes.
        weights: how many each of those has.
    """

    config: SparsityConfig | None
    report: SparsityReport
    formats: dict[str, str]
    stored_bytes: dict[str, int]
    file_bytes: int
    candidates: Candidates | None = None
    bits: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"<CheckpointSparsity: {self.config!r}, sparsity {self.report.sparsity:.4f} found, "
            f"{self.file_bytes:,} bytes>"
        )

    def __str__(self) -> str:
        return "\n".join([self.report.summary(), *self._in_files()])

    def table(self) -> str:
        """A row for each tensor, and the totals."""
        return "\n".join([self.report.table(), *self._in_files()])

    def _repr_html_(self) -> str:
        """For notebooks: the report, and how it is stored."""
        return self.report._repr_html_() + html_table((), (), notes=self._in_files())

    def _in_files(self) -> list[str]:
        """The lines that tell how it is stored, and what its config promises."""
        formats = Counter(self.formats.values())
        stored = ", ".join(f"{name} ({count} tensors)" for name, count in sorted(formats.items()))
        lines = [f"{self.file_bytes:,} bytes in weight files" + (f"; {stored}" if stored else "")]
        for bits in sorted(set(self.bits.values())):
            names = [name for name in self.bits if self.bits[name] == bits]
            weights = sum(self.weights[name] for name in names)
            size = sum(self.stored_bytes[name] for name in names) / max(weights, 1)
            lines.append(
                f"{bits}-bit codes: {len(names)} tensors, {weights:,} weights, {size:.3f} bytes each"
            )
        if self.config is None:
            lines.append("a dense checkpoint: config.json promises nothing")
            return lines if self.candidates is None else [*lines, str(self.candidates)]
        promised, measured = self.config.sparsity, self.report.sparsity
        told = bits_in_words(self.config)
        told = told and f", {told}"
        lines.append(f"config.json promises {self.config.pattern}, sparsity {promised:.4f}{told}")
        if self.report.has_lost_zeros(promised):
            lines.append(f"the zeros are lost: promised {promised:.4f}, found {measured:.4f}")
        return lines


def inspect_checkpoint(folder: str | os.PathLike[str]) -> CheckpointSparsity:
    """Read what a checkpoint holds, checking every compressed tensor on the way.

    Args:
        folder: a checkpoint folder, dense or compressed, or the name of a model on the Hub.

    Memory: one tensor.

    Raises:
        FileNotFoundError: there is no such folder, or no `config.json` in it.
        OSError: the Hub does not have the model, or cannot be reached.
        FormatError: the checkpoint is damaged, incomplete, or of another model than config.json
            describes. Groups that break the promised pattern are counted in the report.
    """
    check_path(folder, "inspect_checkpoint")
    return read_checkpoint(checkpoint_folder(folder))


def read_checkpoint(
    folder: Path, look: Callable[[str, Tensor], None] = lambda name, matrix: None
) -> CheckpointSparsity:
    """`inspect_checkpoint` that also shows each target on the way.

    Args:
        folder: a checkpoint folder, dense or compressed.
        look: is called with the name of each target in the report and its weight
            `(out_features, in_features)`, one at a time.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    check_is_checkpoint(folder)
    config = read_sparsity_config(folder)
    pattern = Unstructured() if config is None else config.pattern
    files = checkpoint_files(folder)
    check_unchanged = watch(files)
    stored = read_headers(files)
    known = Known.of(folder, stored, config)
    check_digests(files)
    counts: list[TensorSparsity] = []
    formats, sizes, parameters, other_zeros = {}, {}, 0, 0
    bits, weights = {}, {}
    for tensor in tqdm(stored, desc="Reading"):
        parts = read_parts(tensor)
        if tensor.compressed and config is None:
            raise FormatError(
                f"{tensor.place} is compressed, but the quantization_config of {folder / CONFIG_NAME} "
                "is not of hf_sparse: config and weights are of different checkpoints."
            )
        with locate(tensor.place):
            weight = decompress(parts) if tensor.compressed else parts[""]
            if (on_grid := known.on_grid(tensor)) is not None:
                on_grid.check_stored(parts, weight)
        counted = []
        for name, matrix, own in _matrices(tensor, parts, weight, pattern, known.targets(tensor)):
            counted.append(count_zeros(name, matrix, own))
            look(name, matrix)
        counts += counted
        if known.is_counted(tensor):
            parameters += weight.numel()
        if known.is_counted(tensor) and weight.is_floating_point():
            other_zeros += int((weight == 0).sum()) - sum(count.zeros for count in counted)
        if counted or tensor.compressed:
            formats[tensor.name] = tensor.format
            sizes[tensor.name] = num_bytes(parts)
            weights[tensor.name] = weight.numel()
        if tensor.coding is not None:
            bits[tensor.name] = CODINGS[tensor.coding].bits
    check_unchanged()
    report = SparsityReport(tuple(counts), str(pattern), parameters, other_zeros=other_zeros)
    total = sum(file.stat().st_size for file in files)
    return CheckpointSparsity(
        config, report, formats, sizes, total, known.candidates, bits, weights
    )


@dataclass(frozen=True)
class Known:
    """What the model of a checkpoint tells of its tensors.

    Attributes:
        config: of the checkpoint; None: it is dense.
        promised: the model; None: no model can be made, and names tell.
        layers: the targets by the names of their parameters, without the base model's prefix.
        uncounted: so named are tensors that are no weights of the model, or once more the same.
        routers: the names, of tensors that are not called as in the model, of what chooses experts.
        candidates: of a dense checkpoint.
        grids: the weights that few bits are promised of, by names as in `layers`.
    """

    config: SparsityConfig | None
    promised: Promised | None = None
    layers: Mapping[str, Sequence[TargetLayer]] = field(default_factory=dict)
    uncounted: Collection[str] = ()
    routers: Collection[str] = ()
    candidates: Candidates | None = None
    grids: Mapping[str, OnGrid] = field(default_factory=dict)

    @classmethod
    def of(
        cls, folder: Path, stored: Sequence[StoredTensor], config: SparsityConfig | None
    ) -> Known:
        """Find the model of a folder, and compare it with what is stored if that is compressed."""
        if config is None:
            return cls._of_dense(folder, stored)
        promised = promised_by(folder, stored)
        promised.check(stored)
        uncounted = _uncounted(promised, stored)
        targets, grids = promised.targets(config), promised.grids(config)
        return cls(config, promised, targets, uncounted, grids=grids)

    @classmethod
    def _of_dense(cls, folder: Path, stored: Sequence[StoredTensor]) -> Known:
        try:
            model = dense_model_in(folder, Size.of(stored))
        except FormatError:  # a model of code that is not here, or none
            return cls(None, routers=_routers(stored))
        promised = Promised(model, folder / CONFIG_NAME, True)
        held = by_identity(block_layers(model))
        layers = {promised.local(held[key][0].parameter_name): held[key] for key in held}
        uncounted = _uncounted(promised, stored)
        return cls(None, promised, layers, uncounted, _routers(stored), candidates_of(model))

    def targets(self, tensor: StoredTensor) -> Sequence[TargetLayer] | None:
        """The targets in a tensor; None: its name tells that it is one, and no more."""
        if self.promised is not None and self.promised.exact:
            local = self.promised.local(tensor.name)
            # Dense checkpoints of some families have each expert by itself, under another name.
            if self.config is not None or local in self.promised.tensors():
                return self.layers.get(local, ())
        coded = tensor.coding is not None
        named = is_target(tensor.name, tensor.compressed, self.config, coded=coded)
        return None if named and tensor.name not in self.routers else ()

    def on_grid(self, tensor: StoredTensor) -> OnGrid | None:
        """The grid that is promised of a tensor."""
        return self.grids.get(self.promised.local(tensor.name)) if self.promised else None

    def is_counted(self, tensor: StoredTensor) -> bool:
        """Whether its numbers are weights of the model."""
        return tensor.name not in self.uncounted


def _routers(stored: Sequence[StoredTensor]) -> set[str]:
    """The names of tensors called `gate` beside `experts`, or `router`."""
    beside = {tensor.name.partition(".experts.")[0] for tensor in stored}
    return {
        tensor.name
        for tensor in stored
        if "router" in tensor.name
        or (tensor.name.endswith(".gate.weight") and tensor.name.rsplit(".", 2)[0] in beside)
    }


def _uncounted(promised: Promised, stored: Sequence[StoredTensor]) -> set[str]:
    """The names of stored buffers, and of tied weights that are stored under two names."""
    buffers = {promised.local(name) for name, _ in promised.model.named_buffers()}
    there = {promised.local(tensor.name) for tensor in stored}
    again = {
        promised.local(name)
        for name, source in tied_names(promised.model).items()
        if promised.local(source) in there and name != source
    }
    return {tensor.name for tensor in stored if promised.local(tensor.name) in buffers | again}


def _matrices(
    tensor: StoredTensor,
    parts: dict[str, Tensor],
    weight: Tensor,
    pattern: Pattern,
    layers: Sequence[TargetLayer] | None,
) -> Iterator[tuple[str, Tensor, Pattern]]:
    """The targets in a tensor with their patterns: a matrix, or some of a stack."""
    if layers is not None:
        yield from ((layer.weight_name, layer.part(weight), pattern) for layer in layers)
        return
    if weight.ndim not in (2, 3):
        return
    transposed = tensor.compressed and read_layout(parts).transposed
    if not tensor.compressed:  # nothing tells how its layer orients it
        pattern = Unstructured()
    for index, matrix in enumerate(oriented(weight, transposed)):
        yield tensor.name if weight.ndim == 2 else f"{tensor.name}.{index}", matrix, pattern


def read_sparsity_config(folder: Path) -> SparsityConfig | None:
    """The sparsity config of a checkpoint folder; None for a dense checkpoint.

    Raises:
        FileNotFoundError: there is no `config.json`.
        FormatError: `config.json` is no JSON object, or was written by a newer version.
    """
    path = folder / CONFIG_NAME
    entry = read_object(path).get("quantization_config") or {}
    if not isinstance(entry, dict):
        raise FormatError(f"{path}: quantization_config is {entry!r}, wanted an object")
    if entry.get("quant_method") != QUANT_METHOD:
        return None
    return read_sparsity(path, entry)
