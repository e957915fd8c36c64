"""Blocks of codes of few bits as bytes, whatever their format: `(16, 16, 4)`, rows in the middle.

Of a block of 64 columns and 16 rows come four columns of every row, then the next four. A byte is
the code, or `code + 128` where the target's products want one factor without a sign.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_sparse.runtime.kernels.call import Signature
from hf_sparse.runtime.kernels.code_formats import BLOCK, ROWS, UNIT, CodeFormat
from hf_sparse.runtime.kernels.code_masks import masked_bytes, masked_codes
from hf_sparse.runtime.kernels.code_rows import unit_codes, unit_places
from hf_sparse.runtime.kernels.extents import Call, Extent, Extents
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, lanes_of

UNPACK_BYTES = Signature(("ptr codes", "ptr places", "ptr room"))


def _extents(target: Target, form: CodeFormat) -> Extents:
    def extents(call: Call) -> Iterator[Extent]:
        yield call.reads("places", form.place_bytes)
        nbytes = form.code_bytes
        if form.is_masked:
            nbytes = masked_bytes(target, call.array("places", np.uint8, form.place_bytes))
        yield call.reads("codes", nbytes)
        yield call.writes("room", ROWS * BLOCK)

    return extents


def unpack_bytes(target: Target, form: CodeFormat) -> Function:
    """The kernel that makes bytes of a block."""
    f = UNPACK_BYTES.function(f"unpack_bytes{form.suffix}", _extents(target, form))
    codes, places, room = f.parameters
    lanes = target.lanes
    sizes = (form.code_bytes or ROWS * BLOCK // 2, form.place_bytes)
    for stream, size in zip((codes, places), sizes, strict=True):
        for line in range(0, size, 64):  # of the next block
            stream.at(size + line).prefetch()

    def store(column: int, number: int, found: Value) -> None:
        stored = found ^ f.constant(-128, found.kind) if target.has.unsigned_dot else found
        room.at(UNIT * (column * ROWS + number * lanes)).store(stored, UNIT * lanes)

    if form.is_masked:
        for unit in range(form.units):
            vectors, codes = masked_codes(f, target, codes, places, unit)
            for number, found in enumerate(vectors):
                store(unit, number, found)
        return f
    for number in range(ROWS // lanes):
        for column, found in enumerate(_columns(f, form, codes, places, number, lanes)):
            store(column, number, found)
    return f


def _columns(
    f: Function, form: CodeFormat, codes: Value, places: Value, number: int, lanes: int
) -> list[Value]:
    """The codes of each four columns for vector `number` of the rows, as bytes with a sign."""

    def signed(unit: int) -> Value:
        stored = unit_codes(f, form, codes, unit, number, lanes)
        return stored if form.bits == 8 else stored - f.constant(8, stored.kind)

    if form.is_dense:
        return [signed(unit) for unit in range(form.units)]
    found = []
    for begun in range(0, BLOCK, form.sweep):
        kept: list[tuple[int, Value, Value]] = []  # window, and codes and columns, each four times
        for unit in range(form.units):
            if form.first_column(unit) != begun:
                continue
            own, columns = signed(unit), unit_places(f, form, places, unit, number, lanes)
            for code in range(UNIT):
                order = [lane // UNIT * UNIT + code for lane in range(UNIT * lanes)]
                window = code // form.kept * form.window if form.sweep > form.window else 0
                four = f.shuffle(own, own, order), f.shuffle(columns, columns, order)
                kept.append((window, *four))
        for first in range(0, form.sweep, UNIT):
            inside = [one[1:] for one in kept if form.sweep == form.window or one[0] == first]
            found.append(_spread(f, inside, first))
    return found


def _spread(f: Function, kept: list[tuple[Value, Value]], first: int) -> Value:
    """The codes that are of the columns `first` to `first + 3`, at their places."""
    kind = kept[0][0].kind
    names = ", ".join(f"i8 {first + lane % UNIT}" for lane in range(lanes_of(kind)))
    columns = Value(f, kind, f"<{names}>")
    found = f.constant(0, kind)
    for code, column in kept:
        found = found | column.compare("eq", columns).select(code, f.constant(0, kind))
    return found
