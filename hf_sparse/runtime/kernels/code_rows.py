"""One token times weights of few bits: y = W x (+ bias) (+ y), with x in eight bits.

    quantise_row   records of x in eight bits, a scale for 64 features (`code_formats.py`)
    code_rows...   the product, for each format of codes

Sums of products of codes and features are exact integers; those of 32 or 64 columns become a float,
which is multiplied by the scales of the weights and of x. Features that are NaN or infinite make all of
their block NaN.

Arguments of `quantise_row`: x (whole blocks of 64; zeros behind the last feature), records, blocks.
Arguments of `code_rows`: codes, places, scales, in the order in which they are read; records of x, y,
bias, rows, blocks of a row, add. y and bias are written and read four rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_sparse.runtime.kernels.byte_products import Features, beside, byte_products
from hf_sparse.runtime.kernels.call import Signature, parameters
from hf_sparse.runtime.kernels.code_formats import (
    BESIDE,
    BLOCK,
    FORMATS,
    RECORD,
    ROWS,
    SCALE,
    SUMS,
    UNIT,
    CodeFormat,
)
from hf_sparse.runtime.kernels.code_masks import masked_bytes, masked_codes
from hf_sparse.runtime.kernels.extents import (
    Call,
    Extent,
    Extents,
    rounded_up,
    rows_of_four,
)
from hf_sparse.runtime.kernels.single_token import GROUP, write_rows
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, lanes_of, vector

# Bytes by which codes, and places and scales, are fetched ahead.
_AHEAD_CODES, _AHEAD_OTHERS = 4096, 1024
# Bytes of a block's codes of a mask that are fetched: those of half of them.
_MASKED = 512
# The largest code of a feature.
LARGEST = 127

QUANTISE_ROW = Signature(("ptr x", "ptr records", "i64 blocks"))
CODE_ROWS = Signature(
    parameters(
        "ptr codes, ptr places, ptr scales, ptr x, ptr y, ptr bias, i64 rows, i64 blocks, i64 add"
    ),
    ("x", "y"),
)


def name(form: CodeFormat) -> str:
    """The symbol of the kernel for a format."""
    return f"code_rows{form.suffix}"


def _records(call: Call) -> Iterator[Extent]:
    yield call.reads("x", 4 * BLOCK * call["blocks"])
    yield call.writes("records", RECORD * call["blocks"])


def _extents(target: Target, form: CodeFormat) -> Extents:
    def extents(call: Call) -> Iterator[Extent]:
        blocks = rounded_up(call["rows"], ROWS) // ROWS * call["blocks"]
        yield call.reads("places", form.place_bytes * blocks)
        yield call.reads("scales", form.scale_bytes * blocks)
        nbytes = form.code_bytes * blocks
        if form.is_masked:
            nbytes = masked_bytes(target, call.array("places", np.uint8, form.place_bytes * blocks))
        yield call.reads("codes", nbytes)
        yield call.reads("x", RECORD * call["blocks"] if blocks else 0)
        yield from rows_of_four(call, call["rows"])

    return extents


def quantise_row(target: Target) -> Function:
    """The kernel that makes records of x."""
    f = QUANTISE_ROW.function("quantise_row", _records)
    x, records, blocks = f.parameters
    lanes, kind = target.lanes, vector(target.lanes)
    integers = vector(lanes, "i32")
    zero, most = f.constant(0.0, kind), f.constant(float(LARGEST), kind)
    with f.range(blocks) as block:
        source, record = x.at(block * (4 * BLOCK)), records.at(block * RECORD)
        parts = [source.at(4 * first).load(kind, 4) for first in range(0, BLOCK, lanes)]
        largest, nothing = zero, zero
        for part in parts:
            size = f.call(kind, f"llvm.fabs.v{lanes}f32", part)
            largest = f.maximum(size, largest)
            nothing = nothing + part * 0.0  # NaN if one is not finite
        top = _largest(f, largest)
        inverse = (f.constant(float(LARGEST), "float") / top).splat(lanes)
        inverse = top.compare("gt", 0.0).splat(lanes).select(inverse, zero)
        record.at(SCALE).store(top / float(LARGEST) + f.total(nothing))
        each, half = BLOCK // lanes // 2, []
        for number in range(2):
            sums, codes = f.constant(0, integers), []
            for part in parts[number * each : (number + 1) * each]:
                # What is not finite becomes some number: none is undefined as an integer.
                limited = f.maximum(f.minimum(part * inverse, most), most * -1.0)
                codes.append(f.round(limited).cast("fptosi", integers))
                sums = sums + codes[-1]
            half.append(f.joined(codes).cast("trunc", vector(BLOCK // 2, "i8")))
            total = f.call("i32", f"llvm.vector.reduce.add.v{lanes}i32", sums)
            record.at(SUMS + 4 * number).store(total)
        whole = f.joined(half)
        record.store(whole, 64)
        record.at(BESIDE).store(beside(f, target, whole), 64)
    return f


def _largest(f: Function, a: Value) -> Value:
    """The largest lane; none is NaN."""
    while lanes_of(a.kind) > 1:
        half = lanes_of(a.kind) // 2
        a = f.maximum(f.part(a, 0, half), f.part(a, half, half))
    return f.emit("float", f"extractelement {a}, i64 0")


def code_rows(target: Target, form: CodeFormat) -> Function:
    """The kernel for codes of a format (`CodeWeight` in `weights/codes.py`)."""
    f = CODE_ROWS.function(name(form), _extents(target, form))
    codes, places, scales, x, y, bias, rows, blocks, add = f.parameters
    kind, vectors = vector(target.lanes), ROWS // target.lanes
    streams = [f.variable(stream) for stream in (codes, places, scales)]
    sizes = (form.code_bytes, form.place_bytes, form.scale_bytes)
    with f.range(rows, step=ROWS) as row:
        sums = [f.variable(f.constant(0.0, kind)) for _ in range(vectors)]
        with f.range(blocks) as block:
            record = x.at(block * RECORD)
            at = [stream.get() for stream in streams]
            for place, size, ahead in zip(
                at, sizes, (_AHEAD_CODES, _AHEAD_OTHERS, _AHEAD_OTHERS), strict=True
            ):
                for line in range(0, size or _MASKED, 64):
                    place.at(ahead + line).prefetch()
            at[0] = _block(f, target, form, at, record, sums)
            for stream, place, size in zip(streams, at, sizes, strict=True):
                stream.set(place.at(size))
        result = f.joined([total.get() for total in sums])
        for first in range(0, ROWS, GROUP):
            with f.when((row + first).compare("lt", rows)):
                write_rows(f, y, bias, add, f.part(result, first, GROUP), row + first)
    return f


def _block(
    f: Function, target: Target, form: CodeFormat, at: list[Value], record: Value, sums: list
) -> Value:
    """Add the products of a block of columns to the sums of 16 rows; where codes went on, if masked."""
    codes = at[0]
    lanes, kind = target.lanes, vector(target.lanes)
    scale = record.at(SCALE).load("float").splat(lanes)
    parts = BLOCK // form.group
    each = form.units // parts
    features = [record.at(SUMS + 4 * half).load("i32") for half in range(2)]
    for part in range(parts):
        products = [byte_products(f, target, form) for _ in sums]
        for unit in range(part * each, (part + 1) * each):
            spread: list[Value] = []
            if form.is_masked:
                spread, codes = masked_codes(f, target, codes, at[1], unit)
            for number, product in enumerate(products):
                stored = (
                    spread[number] if spread else unit_codes(f, form, codes, unit, number, lanes)
                )
                product.add(stored, _features(f, target, form, record, at[1], unit, number))
        of_features = features[part] if parts == 2 else features[0] + features[1]
        for number, (product, total) in enumerate(zip(products, sums, strict=True)):
            weights = scales_of(f, at[2], part, number * lanes, lanes) * scale
            found = product.total(of_features).cast("sitofp", kind)
            total.set(f.fma(found, weights, total.get()))
    return codes


def scales_of(f: Function, scales: Value, part: int, row: int, lanes: int) -> Value:
    """The scales of `lanes` rows from `row` on, for one part of a block's columns."""
    stored = scales.at(2 * (part * ROWS + row)).load(vector(lanes, "i16"), 2)
    return (stored.cast("zext", vector(lanes, "i32")) << 16).cast("bitcast", vector(lanes))


def unit_codes(
    f: Function, form: CodeFormat, codes: Value, unit: int, number: int, lanes: int
) -> Value:
    """The codes of a unit for vector `number` of the rows, as they are stored, in bytes."""
    bits = form.bits
    place = unit * bits // 8 * ROWS * UNIT + number * lanes * UNIT
    loaded = codes.at(place).load(vector(lanes * UNIT, "i8"), 1)
    return loaded if bits == 8 else _field(loaded, unit % 2 * 4, 15)


def unit_places(
    f: Function, form: CodeFormat, places: Value, unit: int, number: int, lanes: int
) -> Value:
    """For each code of a unit, the column among those that the unit sweeps, in bytes."""
    bits = form.place_bits
    shared = 8 // bits
    place = unit // shared * ROWS * UNIT + number * lanes * UNIT
    loaded = places.at(place).load(vector(lanes * UNIT, "i8"), 1)
    found = _field(loaded, unit % shared * bits, (1 << bits) - 1)
    if form.sweep == form.window:
        return found
    # Codes of a unit that are of the windows behind the first one.
    starts = [code // form.kept * form.window for code in range(UNIT)]
    text = ", ".join(f"i8 {start}" for start in starts * lanes)
    return found | Value(f, found.kind, f"<{text}>")


def _field(stored: Value, shift: int, mask: int) -> Value:
    """Some bits of each byte. There are no shifts of bytes."""
    if shift:
        words = vector(lanes_of(stored.kind) // 2, "i16")
        stored = (stored.cast("bitcast", words) >> shift).cast("bitcast", stored.kind)
    return stored & mask


def _features(
    f: Function,
    target: Target,
    form: CodeFormat,
    record: Value,
    places: Value,
    unit: int,
    number: int,
) -> Features:
    """The features that a unit's codes are multiplied with."""
    lanes, sweep = target.lanes, form.sweep
    kind = vector(4 * lanes, "i8")

    def spread(plane: int) -> Value:
        place = record.at(plane + form.first_column(unit))
        if sweep == 16:
            window = place.load(vector(16, "i8"), 16)
            return f.joined([window] * (lanes // 4))
        word = place.load(f"i{8 * sweep}", sweep)
        return word.splat(4 * lanes // sweep).cast("bitcast", kind)

    if form.in_order:
        return spread
    order = unit_places(f, form, places, unit, number, lanes)

    def chosen(plane: int) -> Value:
        return f.call(kind, target.has.wide_shuffle, spread(plane), order)

    return chosen


def code_functions(target: Target) -> list[Function]:
    """All kernels of this file."""
    return [quantise_row(target), *(code_rows(target, form) for form in FORMATS)]
