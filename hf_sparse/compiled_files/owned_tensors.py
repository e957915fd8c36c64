"""Reading a safetensors file into memory that is this process's own.

safetensors maps files: what is written into one afterwards shows up in the tensors, and reading from
one that was cut off ends the process. What machine code follows is read instead, so that it stays as
it was when it was checked. A file that changes while it is read gives an error, or tensors that are
checked like any others.

A file is the length of its header (8 bytes, little-endian), the header (JSON: type, shape, first and
last byte of each tensor), and the tensors, one behind the other without gaps.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hf_sparse.runtime.weights.memory import Shelf

# What safetensors reads at most, too.
_HEADER_BYTES = 100_000_000
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its type, its shape, and where its bytes begin in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"


def read_header(file: BinaryIO) -> dict[str, Entry]:
    """The tensors of a file, in the order of their bytes.

    Raises:
        ValueError: it is no safetensors file, or is cut off: the tensors do not fill it exactly.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _HEADER_BYTES):
        raise ValueError(f"no safetensors file: {size} bytes, and a header of {length}")
    header: Any = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("no safetensors file: its header is no table")
    header.pop("__metadata__", None)
    # Tensors of no bytes come before the one that begins at the same place.
    placed = sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"]))
    entries, at = {}, 8 + length
    for name, told in placed:
        begin, end = (8 + length + offset for offset in told["data_offsets"])
        shape, dtype = tuple(told["shape"]), _TYPES.get(told["dtype"])
        numbers = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        if dtype is None or not numbers:
            raise ValueError(f"{name} is {told['dtype']} of shape {shape}, which is not read")
        entries[name] = Entry(dtype, shape, begin)
        if begin != at or end != begin + entries[name].nbytes:
            raise ValueError(f"{name} is {entries[name]}, and lies at the bytes {begin} to {end}")
        at = end
    if at != size:
        raise ValueError(f"the tensors end at byte {at}, the file at {size}: it is cut off")
    return entries


def read_tensor(file: BinaryIO, entry: Entry, shelf: Shelf | None = None) -> Tensor:
    """Read one tensor into memory of its own, or onto a shelf.

    Raises:
        ValueError: the file was cut off since its header was read.
    """
    with torch.inference_mode(False):
        if shelf is None:
            room = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")
        else:
            room = torch.from_numpy(shelf.room(entry.nbytes))
        file.seek(entry.begin)
        if entry.nbytes and file.readinto(room.numpy()) != entry.nbytes:  # type: ignore[attr-defined]
            raise ValueError("the file was cut off while it was read")
        return room.view(entry.dtype).view(entry.shape)
