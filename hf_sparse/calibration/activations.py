"""Where the hidden states of the calibration data wait for their next block."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

# Puts a tensor away and returns a function that brings it back.
Store = Callable[[Tensor], Callable[[], Tensor]]


def in_memory(tensor: Tensor) -> Callable[[], Tensor]:
    """Keep the tensor as it is."""
    return lambda: tensor


def on_disk(folder: Path) -> Store:
    """A store that keeps tensors in files of `folder`; a file goes when its tensor is dropped."""
    numbers = itertools.count()
    return lambda tensor: _File(folder / f"{next(numbers)}.safetensors", tensor)


class _File:
    def __init__(self, path: Path, tensor: Tensor) -> None:
        self._path, self._device = path, tensor.device
        try:
            save_file({"": tensor.contiguous()}, path)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(f"hidden states cannot be written to {path.parent}: {error}") from error

    def __call__(self) -> Tensor:
        return load_file(self._path, device=str(self._device))[""]

    def __del__(self) -> None:
        self._path.unlink(missing_ok=True)
