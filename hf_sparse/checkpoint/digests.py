"""The digest of a weights' file: what its tensors were when they were saved.

It finds files that were damaged or edited where every count and position still fits. It is no
signature: whoever can write a file can write its digest, too.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hf_sparse.upstream.torch import bytes_of


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the names, types, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(_head(name, tensors[name].dtype, tensors[name].shape))
        digest.update(bytes_of(tensors[name]).numpy().data)
    return digest.hexdigest()


def digest_of_file(file: Path, reader: safe_open) -> str:
    """The same of the tensors of a safetensors file, of which no tensor is made.

    A file that ends too early has another digest.

    Args:
        file: a safetensors file.
        reader: of the file.
    """
    digest, types = hashlib.sha256(), dict[str, torch.dtype]()
    with file.open("rb") as opened:
        begin = 8 + int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(begin - 8))
        header.pop("__metadata__", None)
        with (
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as content,
        ):
            for name in sorted(header):
                told = header[name]
                first, end = told["data_offsets"]
                if told["dtype"] not in types:
                    types[told["dtype"]] = reader.get_tensor(name).dtype
                digest.update(_head(name, types[told["dtype"]], told["shape"]))
                digest.update(content[begin + first : begin + end])
    return digest.hexdigest()


def _head(name: str, dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    return f"{name} {dtype} {tuple(shape)}\n".encode()
