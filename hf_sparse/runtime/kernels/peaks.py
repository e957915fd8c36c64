"""What a core can do at most: multiply-adds without memory, and reading memory without computing.

    multiply_adds   as many sums as hide the latency, `x = x * a + b`, nothing but registers
    reads           the sum of all floats at x, read once and in order

Arguments: x (`SUMS` vectors, read and written), rounds; x, nbytes (a multiple of `SUMS` vectors).
"""

from __future__ import annotations

from collections.abc import Iterator

from hf_sparse.runtime.kernels.call import Signature
from hf_sparse.runtime.kernels.extents import Call, Extent, rounded_up
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import vector

# Sums side by side: latency times multiply-adds a cycle, on the CPUs of today.
SUMS = 10
_AHEAD = 4096

MULTIPLY_ADDS = Signature(("ptr x", "i64 rounds"))
READS = Signature(("ptr x", "i64 nbytes", "ptr y"))


def multiply_adds(target: Target) -> Function:
    """The kernel of multiply-adds: `SUMS` of a vector in each round."""
    size, kind = 4 * target.lanes, vector(target.lanes)

    def extents(call: Call) -> Iterator[Extent]:
        yield call.writes("x", SUMS * size)

    f = MULTIPLY_ADDS.function("multiply_adds", extents)
    x, rounds = f.parameters
    places = [x.at(size * number) for number in range(SUMS)]
    sums = [f.variable(place.load(kind, 4)) for place in places]
    factor = x.load("float").splat(target.lanes)
    with f.range(rounds):
        for total in sums:
            total.set(f.fma(total.get(), factor, factor))
    for place, total in zip(places, sums, strict=True):
        place.store(total.get(), 4)
    return f


def reads(target: Target) -> Function:
    """The kernel that reads; y takes the sums of one vector."""
    size, kind = 4 * target.lanes, vector(target.lanes)

    def extents(call: Call) -> Iterator[Extent]:
        yield call.reads("x", rounded_up(call["nbytes"], SUMS * size))
        yield call.writes("y", size)

    f = READS.function("reads", extents)
    x, nbytes, y = f.parameters
    sums = [f.variable(f.constant(0.0, kind)) for _ in range(SUMS)]
    with f.range(nbytes, step=SUMS * size) as offset:
        place = x.at(offset)
        for line in range(0, SUMS * size, 64):
            place.at(_AHEAD + line).prefetch()
        for number, total in enumerate(sums):
            total.set(total.get() + place.at(number * size).load(kind, 4))
    found = sums[0].get()
    for total in sums[1:]:
        found = found + total.get()
    y.store(found, 4)
    return f
