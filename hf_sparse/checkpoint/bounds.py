"""How large a model may become that a config describes: no larger than what is stored of it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_sparse.checkpoint.reading import StoredTensor
from hf_sparse.formats import FormatError
from hf_sparse.upstream.torch import on_buffers, on_parameters

AGAIN = (
    "Config and weights are of different checkpoints, or incomplete: copy or download them again."
)
# Masks and tables of positions are made anew, whatever is stored: small models have large ones.
_BUFFERS = 2**29
# What is called so is the width of some layer. Up to the given one it is believed of any checkpoint.
_WIDTH = re.compile(r"(.+_)?(hidden_size|intermediate_size|embed_dim|head_dim|n_embd|d_[a-z]+)")
_WIDEST = 10_000_000


@dataclass(frozen=True)
class Size:
    """What there is of a model.

    Attributes:
        tensors: how many are stored for it.
        nbytes: that they take; of a checkpoint, the size of its files.
    """

    tensors: int
    nbytes: int

    @classmethod
    def of(cls, stored: Iterable[StoredTensor]) -> Size:
        """The size of what is stored in files."""
        tensors = list(stored)
        files = {tensor.file for tensor in tensors}
        return cls(len(tensors), sum(file.stat().st_size for file in files if file.is_file()))

    @classmethod
    def of_model(cls, model: nn.Module) -> Size:
        """The size of a model's own state."""
        state = model.state_dict().values()
        return cls(len(state), sum(tensor.numel() * tensor.element_size() for tensor in state))


def check_widths(values: Mapping[str, Any], size: Size, file: Path) -> None:
    """Refuse widths of layers that no stored weight can have.

    Some families take memory of such a size while they are made, wherever the model is to be.

    Args:
        values: of a config, with those of its parts.
        size: of what is stored.
        file: the config's, for errors.

    Raises:
        FormatError: a width is larger than all files are.
    """
    most = max(8 * size.nbytes, _WIDEST)
    for name, value in values.items():
        if isinstance(value, Mapping):
            check_widths(value, size, file)
        elif isinstance(value, int) and value > most and _WIDTH.fullmatch(str(name)):
            raise FormatError(
                f"{file} has {name}={value!r:.40}, and weights of {size.nbytes:,} bytes are stored; "
                f"wanted {most:,} at most. {AGAIN}"
            )


@contextmanager
def bounded(size: Size) -> Iterator[None]:
    """Stop the making of a model that has far more than there is for it.

    Ties, and loading, make several parameters for each tensor. Buffers that are not stored are counted
    before they get memory: a model is made on the meta device first, by transformers too.

    Args:
        size: of what is stored.

    Raises:
        FormatError: the model has too many parameters, or too large buffers.
    """
    most, largest = 20 * size.tensors + 10_000, 4 * size.nbytes + _BUFFERS
    thread = threading.get_ident()
    count = 0
    buffers: dict[tuple[int, str], int] = {}

    def check(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += parameter is not None and threading.get_ident() == thread
        if count > most:
            raise FormatError(
                f"the config describes a model of more than {most} parameters, and {size.tensors} "
                f"tensors are stored. {AGAIN}"
            )

    def check_buffer(module: nn.Module, name: str, buffer: Tensor | None) -> None:
        if buffer is None or threading.get_ident() != thread:
            return
        buffers[id(module), name] = buffer.numel() * buffer.element_size()
        if (total := sum(buffers.values())) > largest:
            raise FormatError(
                f"the config describes a model with buffers of {total:,} bytes, such as "
                f"{type(module).__name__}.{name} of shape {tuple(buffer.shape)}, and weights of "
                f"{size.nbytes:,} bytes are stored; wanted {largest:,} at most. {AGAIN}"
            )

    hooks = [on_parameters(check), on_buffers(check_buffer)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
