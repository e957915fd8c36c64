"""Coding: one way to store the values of a weight in few bits, as a value of a table.

Where values stand and what they are is stored by two parts that know nothing of each other: a format
takes numbers, of which 0 is a zero, and places; a coding makes numbers of weights, and packs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_sparse.formats import bits
from hf_sparse.formats.bits import Bits
from hf_sparse.formats.error import FormatError
from hf_sparse.formats.format import LAYOUT, Format, Layout, Parts, Weight
from hf_sparse.patterns import Pattern
from hf_sparse.quantization import Codes, Grid


@dataclass(frozen=True)
class Coding:
    """A row of the table `hf_sparse.formats.CODINGS`.

    Attributes:
        name: of the part that tells it in a file.
        bits: that a number takes: 8 or 4.
        others: the names of further parts that a weight may have.
        encode: `(matrix, grid)` gives the numbers, int16 like the matrix `(out_features, in_features)`,
            below `2**bits` and 0 for a zero; and the coding's own parts. It raises an OffGridError.
        decode: `(numbers, parts)` gives the codes and scales back: numbers are uint8,
            `(out_features, in_features)`. It raises a FormatError.
        check: `(parts, rows, columns)` raises a FormatError if the coding's own parts are not of such
            a matrix.
    """

    name: str
    bits: int
    others: tuple[str, ...]
    encode: Callable[[Tensor, Grid], tuple[Tensor, Parts]]
    decode: Callable[[NDArray[np.uint8], Mapping[str, Tensor]], Codes]
    check: Callable[[Mapping[str, Tensor], int, int], None]

    def compress(
        self, weight: Weight, form: Format, pattern: Pattern, grid: Grid
    ) -> dict[str, Tensor]:
        """The parts of a weight in a format, its values coded; rows are out_features.

        Raises:
            OffGridError: weights that are not on the grid.
            ValueError: as `Format.compress`.
        """
        numbers, own = self.encode(weight.oriented, grid)
        stacked = () if weight.matrices is None else (weight.matrices,)
        shaped = numbers.reshape(*stacked, *weight.matrix_shape)
        parts = form.compress(Weight(shaped, value_bits=self.bits), pattern).parts()
        parts[LAYOUT][2] = int(weight.transposed)
        return {**parts, "": self._packed(parts[""]), **own}

    def codes(self, layout: Layout, form: Format, parts: Mapping[str, Tensor]) -> Codes:
        """The codes and scales that are stored, of a stack of all its matrices.

        Raises:
            FormatError: the parts contradict each other.
        """
        rows, columns = layout.all_rows, layout.columns
        self.check(parts, rows, columns)
        places = (rows, columns, *layout.parameters)
        positions = np.empty(0, np.uint8)
        if form.decode is not None:
            positions = parts[form.name].cpu().contiguous().numpy()
        values = self._unpacked(parts[""].cpu().numpy(), form.count(positions, *places))
        numbers = values if form.decode is None else form.decode(values, positions, *places)
        return self.decode(numbers.reshape(rows, columns).astype(np.uint8, copy=False), parts)

    def _packed(self, numbers: Tensor) -> Tensor:
        return torch.from_numpy(bits.pack(numbers.to(torch.uint8).numpy(), self.bits))

    def _unpacked(self, packed: NDArray[np.uint8], count: int) -> Bits:
        if packed.size != -(-count * self.bits // 8):
            raise FormatError(
                f"{packed.size} bytes of values are stored; wanted {-(-count * self.bits // 8)} for "
                f"{count} numbers of {self.bits} bits"
            )
        numbers = bits.unpack(packed, self.bits)
        if numbers[count:].any():
            raise FormatError(f"values are stored behind the last one, number {count - 1}")
        return numbers[:count]
