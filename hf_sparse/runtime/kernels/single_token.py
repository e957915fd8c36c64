"""Kernels for one token: vectors of features, and weights that are read once and in order.

With one token a weight is used once, so the time is that of reading it from memory. Rows go in
groups of 4. Per 16 columns a group has one 64-bit word, 16 bits for each of its rows, and the
nonzeros of these 4 x 16 weights in a row; the CPU's expand instruction spreads them over the lanes.
CPUs that have none spread 16 bytes at a time by a shuffle, which a table has for each mask. What is
to come is fetched ahead: without that the memory waits for the kernel.

    sparse_rows   y = W x (+ bias) (+ y)    bitmask words and packed values
    dense_rows    the same for a weight as torch stores it, row by row

Each is there for every type of weights (`weight_types.py`): bfloat16 and float16 are widened as they
are loaded, x, y and the sums are float32.

Arguments of `sparse_rows`: words, values, x, y, bias, groups, words in a row, add. y is written
four at a time, x is read sixteen at a time: both have room for that of their own, and x has zeros
there. Arguments of `dense_rows`: weight, bytes of a row, x, y, bias, groups of 4 rows, columns (a
multiple of 16), add.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_sparse.runtime.kernels import key_extents
from hf_sparse.runtime.kernels.attention import HEADS, SEEN_BY_ONE, UNSEEN
from hf_sparse.runtime.kernels.call import Signature, parameters
from hf_sparse.runtime.kernels.extents import (
    Call,
    Extent,
    Extents,
    rounded_up,
    rows_of_four,
    strided,
)
from hf_sparse.runtime.kernels.single_norms import row_norm, row_rotary
from hf_sparse.runtime.kernels.weight_types import BFLOAT16, WeightType
from hf_sparse.runtime.kernels.weighted_values import weighted_values
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, Variable, vector

# Rows of a group, and columns that a word's bits stand for.
GROUP, COLUMNS = 4, 16
_AHEAD = 4096

SPARSE_ROWS = Signature(
    parameters("ptr words, ptr values, ptr x, ptr y, ptr bias, i64 groups, i64 row_words, i64 add"),
    ("x", "y"),
)
DENSE_ROWS = Signature(
    parameters(
        "ptr weight, i64 row_bytes, ptr x, ptr y, ptr bias, i64 groups, i64 columns, i64 add"
    ),
    ("x", "y"),
)
ATTENTION = Signature((*HEADS, *SEEN_BY_ONE), ("q", "out"))


def _finish(
    f: Function, y: Value, bias: Value, add: Value, sums: list[Variable], group: Value
) -> None:
    """Write a group's four results."""
    result = f.constant(0.0, vector(GROUP))
    for row, total in enumerate(sums):
        result = f.emit(result.kind, f"insertelement {result}, {f.total(total.get())}, i64 {row}")
    write_rows(f, y, bias, add, result, group * GROUP)


def write_rows(f: Function, y: Value, bias: Value, add: Value, result: Value, row: Value) -> None:
    """Write the results of four rows, from `row` on, with the bias and what is there."""
    place, kind = y.at(row * 4), vector(GROUP)
    results = f.variable(result)
    with f.when(bias.cast("ptrtoint", "i64").compare("ne", 0)):
        results.set(results.get() + bias.at(row * 4).load(kind, 4))
    with f.when(add.compare("ne", 0)):
        results.set(results.get() + place.load(kind, 4))
    place.store(results.get(), 4)


def _expand(f: Function, target: Target, weight_type: WeightType, at: Value, bits: Value) -> Value:
    """The weights at `at`, one after another, in the lanes that the last 16 bits name; else 0."""
    if not target.has.expand:
        return _shuffled(f, target, weight_type, at, bits)
    lanes, mask = COLUMNS, bits.cast("trunc", "i16")
    if weight_type is BFLOAT16:
        # Into every other lane of twice as many: the upper halves of floats.
        lanes = 2 * COLUMNS
        odd = f.constant(0xAAAAAAAA, "i32")
        mask = f.call("i32", target.has.deposit, bits.cast("trunc", "i32"), odd)
    kind = vector(lanes, weight_type.lane)
    # A plain load and an expansion between registers are faster than the load that expands.
    loaded = f.emit(kind, f"load volatile {kind}, {at}, align {weight_type.size}")
    name = target.has.expand.format(lanes=lanes, lane=weight_type.lane)
    chosen = mask.cast("bitcast", vector(lanes, "i1"))
    expanded = f.call(kind, name, loaded, f.constant(0, kind), chosen)
    if weight_type is BFLOAT16:
        return expanded.cast("bitcast", vector(COLUMNS))
    return weight_type.floats(f, target, expanded)


def _shuffled(
    f: Function, target: Target, weight_type: WeightType, at: Value, bits: Value
) -> Value:
    """As `_expand`, as many weights at a time as there are in 16 bytes."""
    count, bytes_kind = 16 // weight_type.size, vector(16, "i8")
    table = f.table(f"expand{weight_type.size}", _shuffles(weight_type.size))
    parts = []
    for first in range(0, COLUMNS, count):
        mask = (bits >> first) & ((1 << count) - 1)
        before = bits & ((1 << first) - 1)
        place = at.at(f.popcount(before) * weight_type.size)
        order = table.at(mask * 16).load(bytes_kind, 16)
        spread = f.call(
            bytes_kind, target.has.shuffle, place.load(bytes_kind, weight_type.size), order
        )
        parts.append(
            weight_type.floats(f, target, spread.cast("bitcast", vector(count, weight_type.lane)))
        )
    return f.joined(parts)


def _shuffles(size: int) -> bytes:
    """For each mask of 16 / `size` lanes, the byte that each byte of the lanes takes; 128: zero."""
    lanes = 16 // size
    table = bytearray()
    for mask in range(1 << lanes):
        taken = 0
        for lane in range(lanes):
            if mask >> lane & 1:
                table += bytes(range(size * taken, size * (taken + 1)))
                taken += 1
            else:
                table += bytes([128] * size)
    return bytes(table)


def _packed(target: Target, weight_type: WeightType) -> Extents:
    size, expands = weight_type.size, bool(target.has.expand)

    def extents(call: Call) -> Iterator[Extent]:
        count = call["groups"] * call["row_words"]
        yield call.reads("words", 8 * count)
        words = call.array("words", np.uint64, count)
        if count:
            # The last load is for the last row of the last word: 16 lanes, or as many as 16 bytes have.
            lanes = COLUMNS if expands else 16 // size
            behind = int(words[-1] >> np.uint64(64 - lanes)).bit_count()
            loaded = lanes * (4 if expands and weight_type is BFLOAT16 else size)
            begin = int(np.bitwise_count(words).sum(dtype=np.int64)) - behind
            yield call.reads("values", size * begin + loaded)
            yield call.reads("x", 4 * COLUMNS * call["row_words"])
        yield from rows_of_four(call, GROUP * call["groups"])

    return extents


def _plain(target: Target, weight_type: WeightType) -> Extents:
    def extents(call: Call) -> Iterator[Extent]:
        rows, columns = GROUP * call["groups"], rounded_up(call["columns"], target.lanes)
        yield call.reads("weight", strided(rows, call["row_bytes"], weight_type.size * columns))
        yield call.reads("x", 4 * columns if rows else 0)
        yield from rows_of_four(call, rows)

    return extents


def _attending(lanes: int) -> Extents:
    def extents(call: Call) -> Iterator[Extent]:
        heads, head_dim = call["heads"], call["head_dim"]
        call.wants(call["group"] > 0, "a group of at least one head")
        yield call.reads("q", 4 * heads * head_dim)
        yield call.writes("out", 4 * heads * head_dim)
        rows = -(-heads // call["group"]) * head_dim
        yield from key_extents.row_attention(call, rows, lanes)

    return extents


def sparse_rows(target: Target, weight_type: WeightType) -> Function:
    """The kernel for packed rows (`DecodeWeight` in `weights/rows.py`)."""
    f = SPARSE_ROWS.function(f"sparse_rows{weight_type.suffix}", _packed(target, weight_type))
    words, values, x, y, bias, groups, row_words, add = f.parameters
    kind = vector(COLUMNS)
    stream = f.variable(values)
    zero = f.constant(0.0, kind)
    with f.range(groups) as group:
        sums = [f.variable(zero) for _ in range(GROUP)]
        first = words.at(group * row_words * 8)
        with f.range(row_words) as word:
            place = first.at(word * 8)
            bits = place.load("i64")
            start = stream.get()
            for line in range(0, 32 * weight_type.size, 64):
                start.at(_AHEAD + line).prefetch()
            place.at(_AHEAD // 8).prefetch()
            inputs = x.at(word * (4 * COLUMNS)).load(kind, 4)
            at = start
            for row in range(GROUP):
                loaded = _expand(f, target, weight_type, at, bits >> (COLUMNS * row))
                sums[row].set(f.fma(loaded, inputs, sums[row].get()))
                # Counted from the start, so that the rows do not wait for each other.
                before = (1 << (COLUMNS * (row + 1))) - 1
                if row < GROUP - 1:
                    at = start.at(f.popcount(bits & before) * weight_type.size)
            stream.set(start.at(f.popcount(bits) * weight_type.size))
        _finish(f, y, bias, add, sums, group)
    return f


def dense_rows(target: Target, weight_type: WeightType) -> Function:
    """The kernel for a weight that is not packed."""
    f = DENSE_ROWS.function(f"dense_rows{weight_type.suffix}", _plain(target, weight_type))
    weight, row_bytes, x, y, bias, groups, columns, add = f.parameters
    kind, lanes = vector(target.lanes), target.lanes
    zero = f.constant(0.0, kind)
    with f.range(groups) as group:
        rows = [weight.at((group * GROUP + row) * row_bytes) for row in range(GROUP)]
        sums = [f.variable(zero) for _ in range(GROUP)]
        with f.range(columns, step=lanes) as i:
            inputs = x.at(i * 4).load(kind, 4)
            for row, total in zip(rows, sums, strict=True):
                place = row.at(i * weight_type.size)
                # A group's rows lie behind one another: this is 4 rows further.
                place.at(row_bytes * GROUP).prefetch()
                loaded = weight_type.load(f, target, place, lanes)
                total.set(f.fma(loaded, inputs, total.get()))
        _finish(f, y, bias, add, sums, group)
    return f


def row_attention(target: Target) -> Function:
    """Attention of one query over tiles of keys, whose tokens are the lanes here.

    Arguments: as `attention.py`'s up to the table, then the tokens in a key tile, mask, key_count
    (the query is the last of them), window, scores (memory for a float per key of all tiles), scale.
    """
    f = ATTENTION.function("attention_row", _attending(target.lanes))
    q, out, heads, head_dim, k_first, v_first, group, table, width, mask, *rest = f.parameters
    key_count, window, scores, scale = rest
    lanes, kind = target.lanes, vector(target.lanes)
    zero = f.constant(0.0, kind)
    key_tiles = (key_count + width - 1) / width
    numbers = f.lane_numbers(lanes)
    count = key_count.cast("trunc", "i32").splat(lanes)
    start = (key_count - window - 1).cast("trunc", "i32").splat(lanes)
    factor = scale.splat(lanes)
    unseen = f.constant(UNSEEN, kind)
    with f.range(heads) as head:
        shared = head / group * head_dim
        query, result = q.at(head * head_dim * 4), out.at(head * head_dim * 4)
        largest = f.variable(f.constant(2 * UNSEEN, kind))
        with f.range(key_tiles) as tile:
            described = table.at(tile * 24)
            stride = described.at(8).load("i64")
            rows = described.load("ptr").at((k_first + shared) * stride)
            with f.range(width, step=lanes) as j:
                total = f.variable(zero)
                with f.range(head_dim) as d:
                    weight = query.at(d * 4).load("float").splat(lanes)
                    keys = rows.at(d * stride + j * 4).load(kind, 4)
                    total.set(f.fma(weight, keys, total.get()))
                number = tile * width + j
                position = number.cast("trunc", "i32").splat(lanes) + numbers
                exists = position.compare("lt", count) & position.compare("gt", start)
                added = mask.at(number * 4).load(kind, 4)
                score = exists.select(f.fma(total.get(), factor, added), unseen)
                scores.at(number * 4).store(score, 4)
                largest.set(f.maximum(score, largest.get()))
        values = (v_first + shared, head_dim)
        weighted_values(f, target, scores, largest, (table, key_tiles, width), values, result)
    return f


def decode_functions(target: Target, weight_type: WeightType) -> list[Function]:
    """All kernels of this file, for weights of type `weight_type`."""
    return [
        sparse_rows(target, weight_type),
        dense_rows(target, weight_type),
        row_norm(target, "layer"),
        row_norm(target, "rms"),
        row_rotary(),
        row_attention(target),
    ]
