"""Whether weights are those that something was measured with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Set
from pathlib import Path

import torch
from torch import Tensor

from hf_sparse.checkpoint.reading import StoredTensor, checkpoint_files, read_headers, read_parts
from hf_sparse.formats import FormatError, decompress
from hf_sparse.upstream.torch import bytes_of

# Types in which adding zero makes 0.0 of -0.0, as compression does, and changes nothing else.
_SIGNED_ZEROS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class WeightsHash:
    """A hash of the weights of a model, which does not depend on how or in which order they are stored.

    Memory: one weight.
    """

    def __init__(self) -> None:
        self._digests: list[str] = []

    def add(self, name: str, weight: Tensor) -> None:
        """Add one weight."""
        weight = weight.detach().cpu()
        digest = hashlib.blake2b(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode())
        if weight.dtype in _SIGNED_ZEROS:
            weight = weight + 0.0
        digest.update(bytes_of(weight).numpy().data)
        self._digests.append(digest.hexdigest())

    def hexdigest(self) -> str:
        """The hash of all that were added."""
        return hashlib.blake2b("".join(sorted(self._digests)).encode(), digest_size=16).hexdigest()


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """The hash of the weights of a model, without tied ones."""
    digest = WeightsHash()
    for name, weight in weights.items():
        digest.add(name, weight)
    return digest.hexdigest()


def is_stored_in(folder: Path, weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights of a checkpoint folder can be read and are these, bit for bit.

    Args:
        folder: of the checkpoint.
        weights: of a model, without tied ones.

    Memory: one weight.
    """
    return _holds(folder, weights.keys(), lambda name: weights[name])


def hold_same_weights(folder: Path, other: Path) -> bool:
    """Whether the weights of two checkpoint folders can be read and are the same, bit for bit.

    Memory: two weights.
    """
    try:
        others = {tensor.name: tensor for tensor in read_headers(checkpoint_files(other))}
    except FormatError:
        return False
    return _holds(folder, others.keys(), lambda name: _read(others[name]))


def _holds(folder: Path, names: Set[str], weight_of: Callable[[str], Tensor]) -> bool:
    """Whether the weights of a folder have these names and values."""
    try:
        stored = read_headers(checkpoint_files(folder))
        same = {tensor.name for tensor in stored} == names
        return same and all(_is_equal(_read(each), weight_of(each.name)) for each in stored)
    except FormatError:
        return False


def _is_equal(stored: Tensor, weight: Tensor) -> bool:
    return stored.dtype == weight.dtype and torch.equal(stored, weight.detach().cpu())


def _read(stored: StoredTensor) -> Tensor:
    parts = read_parts(stored)
    return decompress(parts) if stored.compressed else parts[""]
