"""The digest of a weights' file: what its tensors were when they were saved.

It finds files that were damaged or edited where every count and position still fits. It is no
signature: whoever can write a file can write its digest, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from torch import Tensor

from hf_sparse.upstream.torch import bytes_of


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the names, types, shapes and bytes of tensors."""
    return digest_in_order((name, tensors[name]) for name in sorted(tensors))


def digest_in_order(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The same of names and tensors that come one after the other, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor).numpy().data)
    return digest.hexdigest()
