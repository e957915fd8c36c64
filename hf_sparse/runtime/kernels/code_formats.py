"""How the codes of weights of few bits lie in memory, and one token's features in eight bits.

A weight is `code * scale`: an integer of 8 or 4 bits, and a bfloat16 for `group` columns of a row.
Rows go in groups of `ROWS`, columns in blocks of `BLOCK`. A unit has four codes of each of the 16
rows: four bytes are one lane of 32 bits, which a product of bytes fills with the sum of four. So lanes
are rows, and what vectors have (16, 8 or 4 lanes) makes no difference for the bytes in memory.

    pattern     a unit is                                     places
    4 of 4      4 columns                                     none: all weights are there
    2 of 4      two windows of 4 columns, 2 codes of each     2 bits: the column in the window
    8 of 16     half of the codes of a window of 16 columns   4 bits
    4 of 16     all codes of a window of 16 columns           4 bits
    mask        4 columns, codes that are not zero            64 bits, one for each code of a unit

Of a block and 16 rows, one behind the other:

    codes    8 bits: a byte each `(units, 16, 4)`. 4 bits: two units share bytes, the first one has the
             low half; what is stored is `code + 8`
    places   as many units share bytes as there is room for, the first one in the lowest bits
    scales   `(BLOCK / group, 16)`, the upper halves of floats

A mask's codes go on from block to block, as many as there are. Of other patterns, fewer codes than it
keeps are filled up with zeros (of 4 bits 8), at place 0.

Features `x` in eight bits (`kernels/code_rows.py` makes them) have a record for each block: 64 bytes
`q = round(127 x / max|x|)`, 64 bytes that the products of a target want beside them (`|q|`, or
`q + 128`), then `max|x| / 127` as a float, and two i32: the sums of the first and the last 32 `q`.
"""

from __future__ import annotations

from dataclasses import dataclass

# Rows of a group, columns of a block, and codes of a row in a unit.
ROWS, BLOCK, UNIT = 16, 64, 4
# A record of 64 features in eight bits, and where its parts begin.
RECORD, BESIDE, SCALE, SUMS = 192, 64, 128, 132


@dataclass(frozen=True)
class CodeFormat:
    """Codes of `bits` bits, at most `kept` of every `window` columns, a scale for `group` columns."""

    bits: int
    kept: int
    window: int
    group: int

    @property
    def is_dense(self) -> bool:
        """Whether all weights are there."""
        return self.kept == self.window

    @property
    def is_masked(self) -> bool:
        """Whether any weights are there, as masks tell."""
        return self.kept == 0

    @property
    def in_order(self) -> bool:
        """Whether a unit is four columns, one behind the other."""
        return self.is_dense or self.is_masked

    @property
    def units(self) -> int:
        """Units of a block."""
        return BLOCK // UNIT if self.in_order else BLOCK * self.kept // (UNIT * self.window)

    @property
    def place_bits(self) -> int:
        """Of a code's column in its window."""
        return 0 if self.in_order else self.window.bit_length() - 1

    @property
    def sweep(self) -> int:
        """Columns that a unit's codes may be of."""
        return UNIT if self.in_order else max(self.window, self.window * UNIT // self.kept)

    def first_column(self, unit: int) -> int:
        """The first of them, in the block."""
        return UNIT * unit if self.in_order else UNIT * unit // self.kept * self.window

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a block of 16 rows; 0 if that depends on the block."""
        return 0 if self.is_masked else ROWS * UNIT * self.units * self.bits // 8

    @property
    def place_bytes(self) -> int:
        """Bytes of their places."""
        return ROWS * UNIT * self.units * (1 if self.is_masked else self.place_bits) // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of their scales."""
        return 2 * ROWS * BLOCK // self.group

    def bytes_for(self, density: float) -> float:
        """Bytes for one weight of the matrix, zeros counted, of which so many are not zero."""
        codes = density if self.is_masked else 0
        return codes + (self.code_bytes + self.place_bytes + self.scale_bytes) / (ROWS * BLOCK)

    @property
    def pattern(self) -> str:
        """As it is written: `2 of 4`; `dense` if all weights are there, `mask` if any."""
        if self.is_masked:
            return "mask"
        return "dense" if self.is_dense else f"{self.kept} of {self.window}"

    @property
    def name(self) -> str:
        """As rates and explanations call it: `int8 2 of 4`."""
        return f"int{self.bits} {self.pattern}"

    @property
    def suffix(self) -> str:
        """Of the symbols of kernels."""
        return f"_int{self.bits}_{self.kept}of{self.window}_by{self.group}"


# Kept codes and windows, by bits; of a mask none of one. With 4 bits, places of 8 of 16 take what the
# zeros save, and masks most of it.
MASK = (0, 1)
PATTERNS = {8: ((4, 4), (2, 4), (8, 16), (4, 16), MASK), 4: ((4, 4), (2, 4), (4, 16))}
# Columns of a scale. Larger groups have the same scale several times.
GROUPS = (32, 64)
FORMATS = tuple(
    CodeFormat(bits, kept, window, group)
    for bits, patterns in PATTERNS.items()
    for kept, window in patterns
    for group in GROUPS
)
