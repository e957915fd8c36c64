"""One token times weights of which a few are kept in every window of columns: x is shuffled.

    y = W x (+ bias) (+ y)

N:M patterns keep at most `kept` weights in each window of 8 or 16 columns of a row. Instead of
spreading these over the lanes, a register that holds the window of x gives each lane the feature
that its weight wants: one shuffle for all lanes, and nothing that depends on the zeros. Nothing is
rounded: the products are those of the dense weight without the zeros.

Eight lanes are a unit: `8 / kept` rows, `kept` weights of each, whose places in the window lie in one
u32, 3 or 4 bits for each lane. A window of `UNITS` units is read at a time, for as many sums, so
that none waits for another. `weights/shuffled.py` packs; it tells what is checked.

    kept of window   rows of a unit   bytes for a float32 weight, of a two-byte one
    2 of 8           4                1.125                       0.625
    4 of 8           2                2.25                        1.25
    8 of 16          1                2.25                        1.25

Arguments: values and words, in the order in which they are read, x, y, bias, rows, windows of a row,
add. y and bias are read and written four rows at a time; x has whole windows, and zeros behind its
last feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hf_sparse.runtime.kernels.call import Signature, parameters
from hf_sparse.runtime.kernels.extents import Call, Extent, Extents, rounded_up, rows_of_four
from hf_sparse.runtime.kernels.single_token import GROUP, write_rows
from hf_sparse.runtime.kernels.weight_types import FLOAT32, WeightType
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, lanes_of, vector

# Lanes of a unit, and units that are read for each window.
LANES, UNITS = 8, 4
# Bytes by which values and words are fetched ahead.
_AHEAD_VALUES, _AHEAD_WORDS = 4096, 1024

SHUFFLED_ROWS = Signature(
    parameters("ptr values, ptr words, ptr x, ptr y, ptr bias, i64 rows, i64 windows, i64 add"),
    ("x", "y"),
)


@dataclass(frozen=True)
class Window:
    """At most `kept` weights that are not zero in every `columns` columns of a row."""

    columns: int
    kept: int

    @property
    def bits(self) -> int:
        """Of a weight's place in the window."""
        return self.columns.bit_length() - 1

    @property
    def unit_rows(self) -> int:
        """Rows of a unit."""
        return LANES // self.kept

    @property
    def rows(self) -> int:
        """Rows that go together."""
        return UNITS * self.unit_rows

    @property
    def name(self) -> str:
        """As it is written: `4 of 8`."""
        return f"{self.kept} of {self.columns}"

    def bytes_for(self, weight_type: WeightType) -> float:
        """Bytes for one weight of the matrix, zeros counted."""
        return (LANES * weight_type.size + 4) / (self.unit_rows * self.columns)

    def kernel(self, weight_type: WeightType = FLOAT32) -> str:
        """The symbol of the kernel."""
        return f"shuffled{self.kept}of{self.columns}_rows{weight_type.suffix}"


# From the fewest bytes on.
WINDOWS = (Window(8, 2), Window(8, 4), Window(16, 8))


def _extents(window: Window, weight_type: WeightType) -> Extents:
    def extents(call: Call) -> Iterator[Extent]:
        units = rounded_up(call["rows"], window.rows) // window.rows * call["windows"] * UNITS
        yield call.reads("values", LANES * weight_type.size * units)
        yield call.reads("words", 4 * units)
        yield call.reads("x", 4 * window.columns * call["windows"] if units else 0)
        yield from rows_of_four(call, call["rows"])

    return extents


def shuffled_rows(target: Target, window: Window, weight_type: WeightType) -> Function:
    """The kernel for weights of a window (`ShuffledWeight` in `weights/shuffled.py`)."""
    f = SHUFFLED_ROWS.function(window.kernel(weight_type), _extents(window, weight_type))
    values, words, x, y, bias, rows, windows, add = f.parameters
    lanes = max(target.lanes, LANES)
    units, zero = lanes // LANES, f.constant(0.0, vector(lanes))
    shifts = (f.lane_numbers(lanes) & (LANES - 1)) * window.bits
    value_bytes, word_bytes = UNITS * LANES * weight_type.size, UNITS * 4
    values_at, words_at = f.variable(values), f.variable(words)
    with f.range(rows, step=window.rows) as row:
        sums = [f.variable(zero) for _ in range(UNITS // units)]
        with f.range(windows) as number:
            value, word = values_at.get(), words_at.get()
            for line in range(0, value_bytes, 64):
                value.at(_AHEAD_VALUES + line).prefetch()
            word.at(_AHEAD_WORDS).prefetch()
            source = x.at(number * (4 * window.columns)).load(vector(window.columns), 4)
            for place, total in enumerate(sums):
                found = [word.at(4 * (place * units + u)).load("i32") for u in range(units)]
                spread = f.joined([one.splat(LANES) for one in found])
                chosen = _chosen(f, target, window, source, spread >> shifts)
                at = value.at(place * lanes * weight_type.size)
                loaded = weight_type.load(f, target, at, lanes)
                total.set(f.fma(loaded, chosen, total.get()))
            values_at.set(value.at(value_bytes))
            words_at.set(word.at(word_bytes))
        result = _by_rows(f, f.joined([total.get() for total in sums]), window.kept)
        for first in range(0, window.rows, GROUP):
            with f.when((row + first).compare("lt", rows)):
                write_rows(f, y, bias, add, f.part(result, first, GROUP), row + first)
    return f


def _by_rows(f: Function, sums: Value, kept: int) -> Value:
    """The sums of every `kept` lanes."""
    while kept > 1:
        count = lanes_of(sums.kind)
        even, odd = (f.shuffle(sums, sums, range(first, count, 2)) for first in (0, 1))
        sums, kept = even + odd, kept // 2
    return sums


def _chosen(f: Function, target: Target, window: Window, source: Value, places: Value) -> Value:
    """For each lane the feature of `source` at the place that its lowest bits tell."""
    if not target.has.permute:
        return _by_bytes(f, target, window, source, places)
    lanes = target.lanes
    kind = vector(lanes)
    if window.columns <= lanes:
        # Registers that hold the window twice need no mask: the bit behind a place chooses a copy.
        table = f.shuffle(source, source, [lane % window.columns for lane in range(lanes)])
        return f.call(kind, target.has.permute, table, places)
    low, high = (
        f.call(kind, target.has.permute, f.part(source, first, lanes), places)
        for first in (0, lanes)
    )
    return (places & lanes).compare("ne", 0).select(high, low)


def _by_bytes(f: Function, target: Target, window: Window, source: Value, places: Value) -> Value:
    """The same by shuffles of 16 bytes, for each four features of the window, or for all at once."""
    bytes_kind, quarters = vector(16, "i8"), window.columns // 4
    tables = [f.part(source, 4 * q, 4).cast("bitcast", bytes_kind) for q in range(quarters)]
    parts = []
    for first in range(0, lanes_of(places.kind), 4):
        own = f.part(places, first, 4)
        if target.has.lookup:
            index = ((own & (window.columns - 1)) * 0x04040404 + 0x03020100).cast(
                "bitcast", bytes_kind
            )
            name = target.has.lookup.format(tables=quarters)
            parts.append(f.call(bytes_kind, name, *tables, index).cast("bitcast", vector(4)))
            continue
        order = (own & 3) * 0x04040404 + 0x03020100
        quarter = (own >> 2) & (quarters - 1)
        nothing = f.constant(-0x7F7F7F80, order.kind)
        found: Value | None = None
        for number, table in enumerate(tables):
            index = quarter.compare("eq", number).select(order, nothing)
            taken = f.call(bytes_kind, target.has.shuffle, table, index.cast("bitcast", bytes_kind))
            found = taken if found is None else found | taken
        assert found is not None
        parts.append(found.cast("bitcast", vector(4)))
    return f.joined(parts)


def shuffled_functions(target: Target, weight_type: WeightType) -> list[Function]:
    """All kernels of this file, for weights of type `weight_type`."""
    return [shuffled_rows(target, window, weight_type) for window in WINDOWS]
