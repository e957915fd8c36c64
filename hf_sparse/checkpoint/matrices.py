"""The matrices of a checkpoint by name, one in memory at a time."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from hf_sparse.checkpoint.inspect import Known, read_sparsity_config
from hf_sparse.checkpoint.reading import StoredTensor, checkpoint_files, read_headers, read_parts
from hf_sparse.formats import decompress, locate
from hf_sparse.structure.layers import TargetLayer


class StoredMatrices:
    """Reads single matrices of a checkpoint, as reports name them.

    Args:
        folder: a checkpoint folder, dense or compressed.

    Raises:
        FileNotFoundError, FormatError: as `inspect_checkpoint`.
    """

    def __init__(self, folder: Path) -> None:
        stored = read_headers(checkpoint_files(folder))
        known = Known.of(folder, stored, read_sparsity_config(folder))
        self._promised = known.promised
        self._tensors = {self._local(tensor.name): tensor for tensor in stored}
        self._layers: dict[str, TargetLayer] = {
            self._local(layer.weight_name): layer
            for layers in known.layers.values()
            for layer in layers
        }
        self._last: tuple[StoredTensor | None, Tensor | None] = None, None

    def read(self, name: str) -> Tensor | None:
        """The weight `(out_features, in_features)` of a name; None if it is not stored as such.

        The names of a model with a head are found in the checkpoint of one without, and the other
        way round.
        """
        local = self._local(name)
        layer = self._layers.get(local)
        tensor = self._tensors.get(local if layer is None else self._local(layer.parameter_name))
        if tensor is None:
            return None
        weight = self._whole(tensor)
        if layer is not None:
            return layer.part(weight)
        return weight if weight.ndim == 2 else None

    def _local(self, name: str) -> str:
        return name if self._promised is None else self._promised.local(name)

    def _whole(self, tensor: StoredTensor) -> Tensor:
        """A tensor; that of a stack is kept for its next expert."""
        if self._last[0] is not tensor:
            self._last = None, None
            parts = read_parts(tensor)
            with locate(tensor.place):
                weight = decompress(parts) if tensor.compressed else parts[""]
            self._last = tensor, weight
        weight_or_none = self._last[1]
        assert weight_or_none is not None
        return weight_or_none
