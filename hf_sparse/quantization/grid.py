"""Grid: the values that a quantised weight may have, as bits, group size and zero points."""

from __future__ import annotations

from dataclasses import dataclass

from hf_sparse.suggestions import shortened

BITS = (8, 4)
# Inputs that share a scale; None is a whole row.
GROUP_SIZES = (None, 128, 64, 32)
# Scales of weights: normal numbers, whose products with codes are finite.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-100, 2.0**118


@dataclass(frozen=True)
class Grid:
    """The grid of a weight `(out_features, in_features)`: `scale * code`, one scale a group of a row.

    Attributes:
        bits: 8 or 4.
        group_size: consecutive inputs of a row that share a scale: 128, 64, 32; None: the whole row.
        symmetric: codes lie around 0, in [-127, 127] or [-8, 7]. A scale of 4 bits may be negative, so
            that -8 stands for the largest weight of a group whatever its sign. False: each group has a
            zero point `z` in `[0, 2**bits)`, and its codes `c` in the same range mean
            `scale * (c - z)`. Zero is on the grid either way. What this package calls the code of a
            weight is `c - z`: 0 for a zero.

    Raises:
        ValueError: a value outside what is allowed.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(f"bits is {shortened(self.bits)}; wanted 8 or 4.")
        size = self.group_size
        if size is not None and (type(size) is not int or size not in GROUP_SIZES):
            raise ValueError(
                f"group_size is {shortened(size)}; wanted 128, 64 or 32, or None for a scale a row."
            )
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric is {shortened(self.symmetric)}; wanted True or False.")

    def __str__(self) -> str:
        """Such as `int4, groups of 32`."""
        groups = "rows" if self.group_size is None else f"groups of {self.group_size}"
        return f"int{self.bits}, {groups}{'' if self.symmetric else ', zero points'}"

    @property
    def lowest_code(self) -> int:
        """The lowest code. -128 is left out, so that a sum of two int8 products fits in 16 bits."""
        if not self.symmetric:
            return 1 - int(2**self.bits)
        return -127 if self.bits == 8 else -8

    @property
    def highest_code(self) -> int:
        """The highest code."""
        if self.symmetric:
            return 127 if self.bits == 8 else 7
        return int(2**self.bits) - 1

    @property
    def largest_step(self) -> int:
        """The largest code of either sign: how many steps of a scale may lie between 0 and a weight."""
        return max(-self.lowest_code, self.highest_code)

    @property
    def has_signs(self) -> bool:
        """Whether scales may be negative: one code more lies below 0 than above it."""
        return self.symmetric and -self.lowest_code > self.highest_code

    @property
    def span(self) -> int:
        """The codes of a group lie between its lowest one and this many above it."""
        return self.highest_code - self.lowest_code if self.symmetric else self.highest_code

    def columns_per_scale(self, columns: int) -> int:
        """The inputs that share a scale, in a weight with so many inputs.

        Raises:
            ValueError: the group size does not divide them.
        """
        if self.group_size is None:
            return max(columns, 1)
        if columns % self.group_size:
            dividing = [str(size) for size in GROUP_SIZES if size and columns % size == 0]
            raise ValueError(
                f"group_size {self.group_size} does not divide the {columns} inputs of a weight; "
                f"wanted {' or '.join([*dividing, 'None (a scale a row)'])}."
            )
        return self.group_size
