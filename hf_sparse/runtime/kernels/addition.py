"""`y += x`, on rows of a tile or on any aligned floats. Arguments: x, y, vectors."""

from __future__ import annotations

from hf_sparse.runtime.kernels.call import Signature
from hf_sparse.runtime.kernels.extents import vectors
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import vector

SIGNATURE = Signature(("ptr x", "ptr y", "i64 vectors"))


def add(target: Target) -> Function:
    """The kernel."""
    size, kind = 4 * target.lanes, vector(target.lanes)
    f = SIGNATURE.function("add", vectors(size, "y", reads=("x",)))
    x, y, count = f.parameters
    with f.range(count) as i:
        place = y.at(i * size)
        place.store(place.load(kind, 4) + x.at(i * size).load(kind, 4), 4)
    return f
