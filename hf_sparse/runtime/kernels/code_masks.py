"""Codes of which a mask tells where they are, spread over the bytes of a unit.

A unit of 16 rows and 4 columns has a word of 64 bits. CPUs with an expand instruction for bytes spread
64 codes at once, others 16 by a shuffle, whose order a table has for each 8 bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_sparse.runtime.kernels.code_formats import ROWS, UNIT
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, vector

# Bytes that are spread at once without the instruction, and half of them.
_WIDE, _HALF = 16, 8


def masked_bytes(target: Target, masks: NDArray[np.uint8]) -> int:
    """Bytes from the first code of some masks to the last one that is loaded: they come by 64 or 8."""
    if not len(masks):
        return 0
    loaded = ROWS * UNIT if target.has.expand and target.lanes == ROWS else _HALF
    behind = np.bitwise_count(masks[-loaded // 8 :]).sum(dtype=np.int64)
    return int(np.bitwise_count(masks).sum(dtype=np.int64) - behind) + loaded


def masked_codes(
    f: Function, target: Target, codes: Value, masks: Value, unit: int
) -> tuple[list[Value], Value]:
    """The codes of a unit for each vector of the rows, and where the next one's begin."""
    word = masks.at(8 * unit).load("i64")
    behind = codes.at(f.popcount(word))
    if target.has.expand and target.lanes == ROWS:
        kind = vector(ROWS * UNIT, "i8")
        # As in `single_token.py`: a plain load and an expansion between registers are faster.
        loaded = f.emit(kind, f"load volatile {kind}, {codes}, align 1")
        name = target.has.expand.format(lanes=ROWS * UNIT, lane="i8")
        chosen = word.cast("bitcast", vector(ROWS * UNIT, "i1"))
        return [f.call(kind, name, loaded, f.constant(0, kind), chosen)], behind
    parts = []
    for first in range(0, ROWS * UNIT, _WIDE):
        before = word & ((1 << first) - 1)
        parts.append(_spread(f, target, codes.at(f.popcount(before)), word >> first))
    each = target.lanes * UNIT // _WIDE
    return [f.joined(parts[i : i + each]) for i in range(0, len(parts), each)], behind


def _spread(f: Function, target: Target, codes: Value, bits: Value) -> Value:
    """The codes at `codes` in the 16 bytes that the last bits name; else 0."""
    kind = vector(_HALF, "i8")
    low, high = bits & 255, (bits >> _HALF) & 255
    tables = [f.table(f"bytes{first}", _orders(first)) for first in (0, _HALF)]
    orders = [
        table.at(half * _HALF).load(kind, 8)
        for table, half in zip(tables, (low, high), strict=True)
    ]
    loaded = [codes.load(kind, 1), codes.at(f.popcount(low)).load(kind, 1)]
    pairs = [f.joined(pair) for pair in (loaded, orders)]
    return f.call(vector(_WIDE, "i8"), target.has.shuffle, *pairs)


def _orders(first: int) -> bytes:
    """For each mask of 8 bits the bytes that 8 bytes take, counted from `first` on; 128: zero."""
    found = bytearray()
    for mask in range(256):
        taken = first
        for bit in range(8):
            there = mask >> bit & 1
            found.append(taken if there else 128)
            taken += there
    return bytes(found)
