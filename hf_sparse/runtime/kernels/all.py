"""All kernels of a target and a type of weights, compiled together: about two seconds, or nothing
from the cache."""

from __future__ import annotations

import functools
from pathlib import Path

from hf_sparse.runtime.kernels import (
    activation,
    addition,
    attention,
    byte_tiles,
    code_rows,
    dense,
    experts,
    normalisation,
    peaks,
    scored_attention,
    shuffled_rows,
    single_token,
    spmm,
    tiles,
    worker,
)
from hf_sparse.runtime.kernels.weight_types import FLOAT32, WeightType
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.jit import Code, compile_kernels
from hf_sparse.runtime.llvm.target import Target


def kernel_functions(
    target: Target, weight_type: WeightType = FLOAT32, codes: bool = False
) -> list[Function]:
    """Every kernel that a program may name whose weights are of type `weight_type`, or `codes`."""
    functions = [
        worker.worker(target, parallel=parallel, timed=timed)
        for parallel in (True, False)
        for timed in (False, True)
    ]
    functions += [peaks.multiply_adds(target), peaks.reads(target)]
    functions += [tiles.append(), tiles.copy(target), addition.add(target)]
    functions += scored_attention.functions(target) + experts.functions(target)
    functions += single_token.decode_functions(target, weight_type)
    functions += shuffled_rows.shuffled_functions(target, weight_type)
    for name in activation.ACTIVATIONS:
        functions += [activation.activation(target, name, gated=gated) for gated in (False, True)]
    for vectors in (1, 2, 4):
        functions += [
            spmm.spmm(target, height, vectors, spmm.packed_type(height, weight_type))
            for height in spmm.UNROLL
        ]
        functions.append(dense.dense(target, vectors, weight_type))
        functions += [
            normalisation.normalisation(target, norm, vectors) for norm in normalisation.NORMS
        ]
        functions += [
            attention.attention(target, vectors),
            tiles.to_tile(target, vectors),
            tiles.from_tile(target, vectors),
            tiles.rotary(target, vectors),
        ]
    if codes:
        functions += code_rows.code_functions(target) + byte_tiles.byte_tile_functions(target)
    return functions


@functools.cache
def kernels(
    target: Target, cache: Path | None, weight_type: WeightType = FLOAT32, codes: bool = False
) -> Code:
    """The compiled kernels of a target and a type of weights, once per process.

    Args:
        target: what the code is for.
        cache: folder of the machine code, or None.
        weight_type: of the weights that are no codes.
        codes: some weights are codes of few bits.
    """
    return compile_kernels(kernel_functions(target, weight_type, codes), target, cache)
