"""All kernels of a target, compiled together: about a second, or nothing from the cache."""

from __future__ import annotations

import functools
from pathlib import Path

from hf_sparse.runtime import (
    activation,
    attention,
    decode,
    dense,
    normalisation,
    spmm,
    threads,
    tiles,
)
from hf_sparse.runtime.ir import Function
from hf_sparse.runtime.jit import Code, compile_kernels
from hf_sparse.runtime.target import Target


def kernel_functions(target: Target) -> list[Function]:
    """Every kernel that a program may name."""
    functions = [threads.worker(target, True), threads.worker(target, False)]
    functions += [tiles.append(), tiles.copy(target)]
    functions += decode.decode_functions(target)
    for name in activation.ACTIVATIONS:
        functions += [activation.activation(target, name, gated) for gated in (False, True)]
    for vectors in (1, 2, 4):
        functions += [spmm.spmm(target, height, vectors) for height in spmm.UNROLL]
        functions.append(dense.dense(target, vectors))
        functions += [
            normalisation.normalisation(target, norm, vectors) for norm in normalisation.NORMS
        ]
        functions += [
            attention.attention(target, vectors),
            tiles.to_tile(target, vectors),
            tiles.from_tile(target, vectors),
            tiles.rotary(target, vectors),
        ]
    return functions


@functools.cache
def kernels(target: Target, cache: Path | None) -> Code:
    """The compiled kernels of a target, once per process."""
    return compile_kernels(kernel_functions(target), target, cache)
