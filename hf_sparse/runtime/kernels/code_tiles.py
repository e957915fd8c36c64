"""Tiles times weights of few bits: Y (+)= W X, whose codes become floats a few at a time.

    unpack...     16 rows and 64 columns of codes as floats, `code * scale`, which stay in L1
    code_tiles    the product, 4 rows at a time; it unpacks what it needs, whatever the format

So there is one copy of a weight in memory, and nothing is rounded that was not. Zeros are multiplied.
The floats of a block are `(16, 16, 4)`: four columns of every row, then the next four.

Arguments of `code_tiles`: number of the format in `FORMATS`, codes, places, scales (of row 0 and the
first column; codes of a mask those of the first block, and where each block's begin), blocks of a whole
row, columns, first row (of a group) and last one, X, Y, bias, start
(`START_*` of `spmm.py`).
"""

from __future__ import annotations

from hf_sparse.runtime.kernels import spmm
from hf_sparse.runtime.kernels.call import Signature
from hf_sparse.runtime.kernels.code_formats import BLOCK, FORMATS, ROWS, UNIT, CodeFormat
from hf_sparse.runtime.kernels.code_masks import masked_codes
from hf_sparse.runtime.kernels.code_rows import scales_of, unit_codes, unit_places
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, lanes_of, vector

# Rows that share the loads of a row of X.
_SIDE_BY_SIDE = 4

UNPACK = Signature(("ptr codes", "ptr places", "ptr scales", "ptr room"))
CODE_TILES = Signature(
    (
        "i64 format",
        "ptr codes",
        "ptr places",
        "ptr scales",
        "ptr starts",
        "i64 row_blocks",
        "i64 columns",
        "i64 first",
        "i64 last",
        "ptr x",
        "ptr y",
        "ptr bias",
        "i64 start",
    ),
    ("x", "y"),
)


def name(vectors: int) -> str:
    """The symbol of the kernel for tiles of `vectors` vectors."""
    return f"code_tiles{vectors}"


def unpack(target: Target, form: CodeFormat) -> Function:
    """The kernel that makes floats of a block."""
    f = UNPACK.function(f"unpack{form.suffix}")
    codes, places, scales, room = f.parameters
    lanes, each = target.lanes, form.group // UNIT
    for stream, size in (
        (codes, form.code_bytes or ROWS * BLOCK // 2),
        (places, form.place_bytes),
        (scales, form.scale_bytes),
    ):
        for line in range(0, size, 64):  # of the next block
            stream.at(size + line).prefetch()
    spread: list[list[Value]] = []
    for unit in range(form.units if form.is_masked else 0):
        vectors, codes = masked_codes(f, target, codes, places, unit)
        spread.append(vectors)
    for number in range(ROWS // lanes):
        factors = [
            f.shuffle(found, found, [lane // UNIT for lane in range(UNIT * lanes)])
            for found in (
                scales_of(f, scales, part, number * lanes, lanes)
                for part in range(BLOCK // form.group)
            )
        ]
        columns = [vectors[number] for vectors in spread]
        columns = columns or _columns(f, form, codes, places, number, lanes)
        for column, found in enumerate(columns):
            wide = found.cast("sext", vector(UNIT * lanes, "i32"))
            floats = wide.cast("sitofp", vector(UNIT * lanes)) * factors[column // each]
            place = room.at(4 * UNIT * (column * ROWS + number * lanes))
            place.store(floats, 4 * lanes)
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


def code_tiles(target: Target, vectors: int) -> Function:
    """The kernel for tiles `vectors` vectors wide."""
    f = CODE_TILES.function(name(vectors))
    _Kernel(f, target, vectors).write()
    return f


class _Kernel:
    def __init__(self, f: Function, target: Target, vectors: int) -> None:
        self.f, self.target, self.vectors = f, target, vectors
        self.format, self.codes, self.places, self.scales, self.starts, *rest = f.parameters
        self.row_blocks, *rest = rest
        self.columns, self.first, self.last, self.x, self.y, self.bias, self.start = rest
        self.size, self.kind = 4 * target.lanes, vector(target.lanes)
        self.tile_row = self.size * vectors
        # Sums that fit the registers, with room for a row of X and a weight.
        self.width = vectors
        while _SIDE_BY_SIDE * self.width > target.registers // 2:
            self.width //= 2
        self.room, self.arguments = f.scratch(4 * ROWS * BLOCK), f.scratch(8 * 4)

    def write(self) -> None:
        f = self.f
        rows = f.range(self.last, start=self.first, step=ROWS)
        with rows as row, f.range(self.columns, step=BLOCK) as begun:
            self._unpack(row / ROWS * self.row_blocks + begun / BLOCK)
            left = f.minimum_integer(self.last - row, f.constant(ROWS, "i64"))
            whole = left / _SIDE_BY_SIDE * _SIDE_BY_SIDE
            with f.range(whole, step=_SIDE_BY_SIDE) as r:
                self._multiply(row, r, begun, _SIDE_BY_SIDE)
            with f.range(left, start=whole) as r:
                self._multiply(row, r, begun, 1)

    def _unpack(self, block: Value) -> None:
        """Make floats of a block, by the kernel for the format."""
        f = self.f
        for case in f.cases(self.format, len(FORMATS)):
            form = FORMATS[case]
            begin = block * form.code_bytes
            if form.is_masked:
                begin = self.starts.at(block * 8).load("i64")
            places = [
                self.codes.at(begin),
                self.places.at(block * form.place_bytes),
                self.scales.at(block * form.scale_bytes),
            ]
            for number, place in enumerate([*places, self.room]):
                self.arguments.at(8 * number).store(place)
            f.do(f"call void @unpack{form.suffix}({self.arguments})")

    def _multiply(self, row: Value, r: Value, begun: Value, height: int) -> None:
        """Rows `r` to `r + height` of the block, times its columns."""
        f = self.f
        number = row + r
        outputs = [self.y.at((number + i) * self.tile_row) for i in range(height)]
        weights = self.room.at(r * (4 * UNIT))
        count = f.minimum_integer(self.columns - begun, f.constant(BLOCK, "i64"))
        inputs = self.x.at(begun * self.tile_row)
        mode = begun.compare("eq", 0).select(self.start, f.constant(spmm.START_SUM, "i64"))
        for first in range(0, self.vectors, self.width):
            sums = [
                [f.variable(f.constant(0.0, self.kind)) for _ in range(self.width)]
                for _ in range(height)
            ]
            self._begin(mode, number, outputs, sums, first)
            whole = count / UNIT * UNIT
            with f.range(whole, step=UNIT) as column:
                unit = weights.at(column * (4 * ROWS))
                for lane in range(UNIT):
                    source = inputs.at(column * self.tile_row).at(lane * self.tile_row)
                    self._add(unit.at(4 * lane), source, sums, first)
            with f.range(count, start=whole) as column:
                unit = weights.at(whole * (4 * ROWS)).at((column - whole) * 4)
                self._add(unit, inputs.at(column * self.tile_row), sums, first)
            for output, totals in zip(outputs, sums, strict=True):
                for v, total in enumerate(totals):
                    output.at(self.size * (first + v)).store(total.get(), self.size)

    def _begin(self, mode: Value, row: Value, outputs: list, sums: list, first: int) -> None:
        """Begin the sums, vectors `first ..` of the tile, as `mode` says."""
        f = self.f
        for case in f.cases(mode, 3):
            for i, (output, totals) in enumerate(zip(outputs, sums, strict=True)):
                for v, total in enumerate(totals):
                    value = f.constant(0.0, self.kind)
                    if case in (spmm.START_SUM, spmm.START_SUM_BIAS):
                        value = output.at(self.size * (first + v)).load(self.kind, self.size)
                    if case in (spmm.START_BIAS, spmm.START_SUM_BIAS):
                        added = self.bias.at((row + i) * 4).load("float")
                        value = value + added.splat(self.target.lanes)
                    total.set(value)

    def _add(self, weight: Value, source: Value, sums: list, first: int) -> None:
        """Add the products of one column with the weights at `weight`, a unit apart."""
        loaded = [
            source.at(self.size * (first + v)).load(self.kind, self.size) for v in range(self.width)
        ]
        for i, totals in enumerate(sums):
            factor = weight.at(4 * UNIT * i).load("float").splat(self.target.lanes)
            for value, total in zip(loaded, totals, strict=True):
                total.set(self.f.fma(factor, value, total.get()))


def code_tile_functions(target: Target) -> list[Function]:
    """All kernels of this file."""
    unpacking = [unpack(target, form) for form in FORMATS]
    return [*unpacking, *(code_tiles(target, vectors) for vectors in (1, 2, 4))]
