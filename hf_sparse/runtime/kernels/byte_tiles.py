"""Tiles times weights of few bits: Y (+)= W X, by products of bytes.

    quantise_tile   records of a tile of X in eight bits, a scale for 64 features of each token
    byte_tiles      the product, 4 rows at a time; it unpacks what it needs (`unpack_bytes.py`)

Lanes are tokens: four bytes of a lane are four features of a token, and a weight is four codes of a
row in every lane. Sums of 32 or 64 columns are exact integers; then they become floats, times the
scales of the row and of the token. So a tile gives what its tokens give one by one (`code_rows.py`).

A record of 64 features of the T tokens of a tile is: `(16, T, 4)` bytes `q = round(127 x / max|x|)`, T
floats `max|x| / 127`, and twice T i32, `-128` times the sums of the first and the last 32 `q`, which is
what a product has too much where codes are stored as `code + 128` (`byte_products.py`). Tokens that
have features that are NaN or infinite become NaN.

Arguments of `quantise_tile`: X, records, columns. Of `byte_tiles`: number of the format in `FORMATS`,
codes, places, scales (of row 0 and the first column), where codes of each block start behind
`codes` (of a mask's format), blocks of a whole row, columns, first row (of a
group) and last one, records of X, Y, bias, start (`START_*` of `spmm.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_sparse.runtime.kernels import spmm
from hf_sparse.runtime.kernels.call import Signature, parameters
from hf_sparse.runtime.kernels.code_formats import BLOCK, FORMATS, ROWS, UNIT, CodeFormat
from hf_sparse.runtime.kernels.code_masks import masked_bytes
from hf_sparse.runtime.kernels.code_rows import LARGEST, scales_of
from hf_sparse.runtime.kernels.extents import Call, Extent, Extents, rounded_up
from hf_sparse.runtime.kernels.tile_sums import begun_sums, store_sums
from hf_sparse.runtime.kernels.unpack_bytes import unpack_bytes
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, Variable, vector

# Numbers of four bytes that a record has for each token: codes, their scale, two offsets.
RECORD_NUMBERS = BLOCK // UNIT + 3
# Rows that share the loads of X.
_SIDE_BY_SIDE = 4
# Units in one round of the loop over them.
_UNROLL = 4

QUANTISE_TILE = Signature(("ptr x", "ptr records", "i64 columns"))
BYTE_TILES = Signature(
    parameters(
        "i64 format, ptr codes, ptr places, ptr scales, ptr starts, i64 row_blocks, "
        "i64 columns, i64 first, i64 last, ptr x, ptr y, ptr bias, i64 start"
    ),
    ("x", "y"),
)


def record_features(features: int) -> int:
    """Numbers of four bytes that the records of so many features have for each token."""
    return -(-features // BLOCK) * RECORD_NUMBERS


def quantise_tile(target: Target, vectors: int) -> Function:
    """The kernel that makes records of tiles `vectors` vectors wide."""
    row = 4 * target.lanes * vectors

    def extents(call: Call) -> Iterator[Extent]:
        yield call.reads("x", row * call["columns"])
        yield call.writes("records", row * record_features(call["columns"]))

    f = QUANTISE_TILE.function(f"quantise_tile{vectors}", extents)
    x, records, columns = f.parameters
    with f.range(columns, step=BLOCK) as begun:
        source = x.at(begun * row)
        record = records.at(begun / BLOCK * (RECORD_NUMBERS * row))
        count = f.minimum_integer(columns - begun, f.constant(BLOCK, "i64"))
        for number in range(vectors):
            at = 4 * target.lanes * number
            _quantise(f, target.lanes, source.at(at), record.at(at), row, count)
    return f


def _quantise(
    f: Function, lanes: int, source: Value, record: Value, row: int, count: Value
) -> None:
    """One vector of tokens of a block that has `count` features."""
    kind, integers = vector(lanes), vector(lanes, "i32")
    zero, most = f.constant(0.0, kind), f.constant(float(LARGEST), kind)
    largest, nothing = f.variable(zero), f.variable(zero)
    with f.range(count) as column:
        part = source.at(column * row).load(kind, 4 * lanes)
        size = f.call(kind, f"llvm.fabs.v{lanes}f32", part)
        largest.set(f.maximum(size, largest.get()))
        nothing.set(nothing.get() + part * 0.0)  # NaN if one is not finite
    top = largest.get()
    inverse = top.compare("gt", 0.0).select(most / top, zero)
    record.at(BLOCK // UNIT * row).store(top / float(LARGEST) + nothing.get(), 4 * lanes)
    for half in range(2):
        units = BLOCK // UNIT // 2
        sums = f.variable(f.constant(0, integers))
        with f.range(f.constant((half + 1) * units, "i64"), start=half * units) as unit:
            word = f.constant(0, integers)
            for place in range(UNIT):
                column = unit * UNIT + place
                there = f.minimum_integer(column, count - 1)
                scaled = source.at(there * row).load(kind, 4 * lanes) * inverse
                # What is not finite becomes some number: none is undefined as an integer.
                limited = f.maximum(f.minimum(scaled, most), most * -1.0)
                code = f.round(limited).cast("fptosi", integers)
                code = column.compare("lt", count).select(code, f.constant(0, integers))
                sums.set(sums.get() + code)
                word = word | ((code & 255) << (8 * place))
            record.at(unit * row).store(word, 4 * lanes)
        offset = record.at((BLOCK // UNIT + 1 + half) * row)
        offset.store(sums.get() * -128, 4 * lanes)


def name(vectors: int) -> str:
    """The symbol of the kernel for tiles of `vectors` vectors."""
    return f"byte_tiles{vectors}"


def _extents(target: Target, row: int) -> Extents:
    # Without a product of which one factor has no sign, the offsets of a record are not read.
    last_used = row * (RECORD_NUMBERS - (0 if target.has.unsigned_dot else 2))

    def extents(call: Call) -> Iterator[Extent]:
        call.wants(0 <= call["format"] < len(FORMATS), f"a format under {len(FORMATS)}")
        call.wants(0 <= call["start"] <= 2, "a start of 0, 1 or 2")
        form, first, last, row_blocks = (
            FORMATS[call["format"]],
            *(call[name] for name in ("first", "last", "row_blocks")),
        )
        count = max(last - first, 0)
        blocks = rounded_up(call["columns"], BLOCK) // BLOCK
        for group in range(first // ROWS, (first + rounded_up(count, ROWS)) // ROWS):
            yield from _of_blocks(call, target, form, group * row_blocks, blocks)
        if count and blocks:
            yield call.reads("x", row * RECORD_NUMBERS * (blocks - 1) + last_used)
            yield call.writes("y", row * count, at=row * first)
            if call["start"]:
                yield call.reads("bias", 4 * count, at=4 * first)

    return extents


def _of_blocks(
    call: Call, target: Target, form: CodeFormat, first: int, count: int
) -> Iterator[Extent]:
    """The streams of `count` blocks of one group of rows."""
    yield call.reads("scales", form.scale_bytes * count, at=form.scale_bytes * first)
    yield call.reads("places", form.place_bytes * count, at=form.place_bytes * first)
    if not form.is_masked:
        yield call.reads("codes", form.code_bytes * count, at=form.code_bytes * first)
        return
    yield call.reads("starts", 8 * count, at=8 * first)
    for block in range(first, first + count):
        place = form.place_bytes * block
        masks = call.array("places", np.uint8, form.place_bytes, at=place)
        (start,) = call.array("starts", np.int64, 1, at=8 * block).tolist()
        yield call.reads("codes", masked_bytes(target, masks), at=start)


def byte_tiles(target: Target, vectors: int) -> Function:
    """The kernel for tiles `vectors` vectors wide."""
    f = BYTE_TILES.function(name(vectors), _extents(target, 4 * target.lanes * vectors))
    _Kernel(f, target, vectors).write()
    return f


class _Kernel:
    def __init__(self, f: Function, target: Target, vectors: int) -> None:
        self.f, self.target, self.vectors = f, target, vectors
        self.format, self.codes, self.places, self.scales, self.starts, *rest = f.parameters
        (
            self.row_blocks,
            self.columns,
            self.first,
            self.last,
            self.x,
            self.y,
            self.bias,
            self.start,
        ) = rest
        self.lanes, self.size, self.kind = target.lanes, 4 * target.lanes, vector(target.lanes)
        self.bytes, self.sums = vector(self.size, "i8"), vector(target.lanes, "i32")
        self.tile_row = self.size * vectors
        # Sums that fit the registers, with room for X and a weight.
        self.width = vectors
        while _SIDE_BY_SIDE * self.width > target.registers // 2:
            self.width //= 2
        self.room, self.arguments = f.scratch(ROWS * BLOCK), f.scratch(8 * 3)

    def write(self) -> None:
        f = self.f
        rows = f.range(self.last, start=self.first, step=ROWS)
        with rows as row, f.range(self.columns, step=BLOCK) as begun:
            block = row / ROWS * self.row_blocks + begun / BLOCK
            record = self.x.at(begun / BLOCK * (RECORD_NUMBERS * self.tile_row))
            mode = begun.compare("eq", 0).select(self.start, f.constant(spmm.START_SUM, "i64"))
            left = f.minimum_integer(self.last - row, f.constant(ROWS, "i64"))
            whole = left / _SIDE_BY_SIDE * _SIDE_BY_SIDE
            for group in f.cases(self._unpack(block), 2):
                with f.range(whole, step=_SIDE_BY_SIDE) as r:
                    self._multiply(row, r, block, record, mode, _SIDE_BY_SIDE, 2 - group)
                with f.range(left, start=whole) as r:
                    self._multiply(row, r, block, record, mode, 1, 2 - group)

    def _unpack(self, block: Value) -> Value:
        """Make bytes of a block, by the kernel for the format; 1 if it has one scale, 0 if two."""
        f = self.f
        single = f.variable(f.constant(0, "i64"))
        for case in f.cases(self.format, len(FORMATS)):
            form = FORMATS[case]
            begin = block * form.code_bytes
            if form.is_masked:
                begin = self.starts.at(block * 8).load("i64")
            places = [self.codes.at(begin), self.places.at(block * form.place_bytes), self.room]
            for number, place in enumerate(places):
                self.arguments.at(8 * number).store(place)
            f.do(f"call void @unpack_bytes{form.suffix}({self.arguments})")
            single.set(f.constant(int(form.group == BLOCK), "i64"))
        return single.get()

    def _multiply(
        self,
        row: Value,
        r: Value,
        block: Value,
        record: Value,
        mode: Value,
        height: int,
        parts: int,
    ) -> None:
        """Rows `r` to `r + height` of the block, times its columns, which have `parts` scales."""
        f = self.f
        outputs = [self.y.at((row + r + i) * self.tile_row) for i in range(height)]
        weights = self.room.at(r * UNIT)
        scales = self.scales.at(block * (2 * ROWS * parts)).at(r * 2)
        each = BLOCK // UNIT // parts
        for first in range(0, self.vectors, self.width):
            totals = begun_sums(
                f, self.target, mode, self.bias, row + r, outputs, first, self.width
            )
            for part in range(parts):
                sums = self._open(record, height, first, part, parts)
                with f.range(
                    f.constant((part + 1) * each, "i64"), start=part * each, step=_UNROLL
                ) as unit:
                    for step in range(_UNROLL):
                        self._add(record, weights, unit + step, sums, first)
                for i in range(height):
                    scale = scales_of(f, scales.at(2 * ROWS * part), 0, i, 1)
                    self._close(record, scale, sums[i], totals[i], first)
            store_sums(self.target, outputs, totals, first)

    def _open(
        self, record: Value, height: int, first: int, part: int, parts: int
    ) -> list[list[Variable]]:
        """Integer sums, that begin with what codes stored as `code + 128` have too much."""
        f, found = self.f, []
        for v in range(self.width):
            begin = f.constant(0, self.sums)
            if self.target.has.unsigned_dot:
                for half in range(2) if parts == 1 else (part,):
                    at = (BLOCK // UNIT + 1 + half) * self.tile_row + self.size * (first + v)
                    begin = begin + record.at(at).load(self.sums, self.size)
            found.append(begin)
        return [[f.variable(begin) for begin in found] for _ in range(height)]

    def _add(
        self, record: Value, weights: Value, unit: Value, sums: list[list[Variable]], first: int
    ) -> None:
        """Add the products of four columns."""
        source = record.at(unit * self.tile_row)
        features = [
            source.at(self.size * (first + v)).load(self.bytes, self.size)
            for v in range(self.width)
        ]
        sizes = [self._size(one) for one in features]
        for i, of_row in enumerate(sums):
            word = weights.at(unit * (ROWS * UNIT)).at(UNIT * i).load("i32", 4)
            codes = word.splat(self.lanes)
            for one, size, total in zip(features, sizes, of_row, strict=True):
                total.set(self._dot(total.get(), codes, one, size))

    def _size(self, features: Value) -> Value:
        """What a target wants to have of features beside them: their sizes."""
        if self.target.has.unsigned_dot or not self.target.has.pair_products:
            return features
        zero = self.f.constant(0, "i1")
        return self.f.call(self.bytes, f"llvm.abs.v{self.size}i8", features, zero)

    def _dot(self, total: Value, codes: Value, features: Value, size: Value) -> Value:
        """`total` plus the products of four codes and four features in each lane."""
        f, has = self.f, self.target.has
        if has.unsigned_dot:
            words = features.cast("bitcast", self.sums)
            return f.call(self.sums, has.unsigned_dot, total, codes, words)
        own = codes.cast("bitcast", self.bytes)
        if has.pair_products:
            signed = f.call(self.bytes, has.signed_as, own, features)
            pairs = f.call(vector(2 * self.lanes, "i16"), has.pair_products, size, signed)
            ones = f.constant(1, pairs.kind)
            return total + f.call(self.sums, has.pair_sums, pairs, ones)
        if has.signed_dot:
            return f.call(self.sums, has.signed_dot, total, own, features)
        halves = []
        for start in (0, 8):
            parts = [f.part(one, start, 8) for one in (own, features)]
            product = f.call(vector(8, "i16"), has.long_product, *parts)
            halves.append(f.call(self.sums, has.long_pairs, product))
        return total + f.call(self.sums, has.add_pairs, *halves)

    def _close(
        self, record: Value, scale: Value, sums: list[Variable], totals: list[Variable], first: int
    ) -> None:
        """Add a row's integers, times its scale and the tokens', to its floats."""
        f = self.f
        factor = f.emit("float", f"extractelement {scale}, i64 0").splat(self.lanes)
        for v, (whole, total) in enumerate(zip(sums, totals, strict=True)):
            at = BLOCK // UNIT * self.tile_row + self.size * (first + v)
            tokens = record.at(at).load(self.kind, self.size) * factor
            total.set(f.fma(whole.get().cast("sitofp", self.kind), tokens, total.get()))


def byte_tile_functions(target: Target) -> list[Function]:
    """All kernels of this file."""
    found = [unpack_bytes(target, form) for form in FORMATS]
    for vectors in (1, 2, 4):
        found += [quantise_tile(target, vectors), byte_tiles(target, vectors)]
    return found
