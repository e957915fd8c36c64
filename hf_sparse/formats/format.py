"""Format: one way to store a weight, as a value. Each file beside this one holds one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_sparse.formats import bits
from hf_sparse.formats.bits import Bits
from hf_sparse.formats.error import FormatError
from hf_sparse.patterns import Pattern

# The part that holds rows, columns, whether they are swapped in the model, and the parameters.
LAYOUT = "layout"
# A layout is believed up to this many weights: gap codes and blocks do not bound it by their size.
LARGEST_WEIGHT = 2**40
_FIXED = 3  # numbers in a layout before the parameters

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Weight:
    """A weight to be stored, and what several formats want to know of it.

    Attributes:
        tensor: 2-D, or 3-D: a stack of matrices; on the CPU, as the model has it. Of a weight whose
            values are coded, the numbers that are packed, as int16.
        transposed: each matrix is `(in_features, out_features)`.
        value_bits: bits that a coded value takes in a file; None: values are stored as they are.
    """

    tensor: Tensor
    transposed: bool = False
    value_bits: int | None = None

    def value_bytes(self, count: int) -> int:
        """The bytes that so many values take in a file."""
        if self.value_bits is None:
            return count * self.tensor.element_size()
        return -(-count * self.value_bits // 8)

    @property
    def oriented(self) -> Tensor:
        """`(out_features, in_features)`; of a stack the matrices one below the other."""
        turned = self.tensor.mT if self.transposed else self.tensor
        rows, columns = self.matrix_shape
        return turned.reshape(rows * (1 if self.matrices is None else self.matrices), columns)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`out_features` and `in_features` of one matrix."""
        rows, columns = self.tensor.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def matrices(self) -> int | None:
        """How many matrices are stacked; None: it is one, and no stack."""
        return len(self.tensor) if self.tensor.ndim == 3 else None

    @cached_property
    def flat(self) -> Bits:
        """The bit patterns, in the tensor's row-major order."""
        return bits.as_bits(self.tensor).reshape(-1)

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Where `flat` is not zero."""
        return bits.nonzero_mask(self.flat)

    @cached_property
    def num_nonzeros(self) -> int:
        """How many weights are not zero."""
        return int(np.count_nonzero(self.mask))


@dataclass(frozen=True)
class Layout:
    """What a stored weight's layout tells.

    Attributes:
        format: its name.
        rows, columns: of the stored matrix; of a stack, of each of its matrices.
        transposed: the model's weight is the transpose of the stored matrix.
        parameters: of the format.
        matrices: how many are stacked; None: it is one, and no stack.
        coding: the name of the coding of its values; None: they are stored as they are.
    """

    format: str
    rows: int
    columns: int
    transposed: bool
    parameters: tuple[int, ...]
    matrices: int | None = None
    coding: str | None = None

    @property
    def all_rows(self) -> int:
        """The rows of all matrices, one below the other."""
        return self.rows * (1 if self.matrices is None else self.matrices)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the model's weight."""
        shape = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        return shape if self.matrices is None else (self.matrices, *shape)


@dataclass(frozen=True)
class Encoded:
    """A weight in a format. Nonzeros are copied when the parts are asked for, not before.

    Attributes:
        nbytes: bytes that the parts take in a file, headers aside.
        parts: gives the tensors by name.
    """

    nbytes: int
    parts: Callable[[], Parts]


def _any_pattern(pattern: Pattern) -> bool:
    return True


def _any_parameters(rows: int, columns: int) -> bool:
    return True


def _no_bound(weight: Weight) -> int:
    return 0


def _any_weight(weight: Weight) -> bool:
    return True


def _all_weights(positions: NDArray[np.uint8], rows: int, columns: int) -> int:
    return rows * columns


@dataclass(frozen=True)
class Format:
    """A row of the table `hf_sparse.formats.FORMATS`.

    Attributes:
        name: what `format=` accepts, and the name of its part in a file.
        summary: a few words for help texts and tables.
        encode: `(weight, pattern)` gives a Weight in the format. It raises a ValueError if the
            pattern cannot divide the weight, or the weight does not follow it.
        decode: `(values, positions, rows, columns, *parameters)` gives the bit patterns of a weight
            back, and raises a FormatError if they contradict each other. None: the format has no
            part of its own, it stores the weight as it is, or in another format.
        num_parameters: numbers in the layout behind rows, columns and `transposed`.
        check: `(rows, columns, *parameters)` tells whether a weight can have such a layout.
        structured: the format is made for patterns with groups: rows are out_features, and zeros
            may be among the values. Others store the nonzeros of any weight.
        fits: whether it stores weights of a pattern.
        stores: the patterns that fit, for errors.
        least: bytes that `encode` needs at the very least: what cannot win is not tried.
        count: `(positions, rows, columns, *parameters)` gives the number of values, of positions that
            nobody has checked yet.
        offered: whether format `auto` may choose it for a weight.
    """

    name: str
    summary: str
    encode: Callable[[Weight, Pattern], Encoded]
    decode: Callable[..., Bits] | None = None
    num_parameters: int = 0
    check: Callable[..., bool] = _any_parameters
    structured: bool = False
    fits: Callable[[Pattern], bool] = _any_pattern
    stores: str = "any pattern"
    least: Callable[[Weight], int] = _no_bound
    count: Callable[..., int] = _all_weights
    offered: Callable[[Weight], bool] = _any_weight

    def compress(self, weight: Weight, pattern: Pattern) -> Encoded:
        """The weight in this format.

        Raises:
            ValueError: the format does not store the pattern, the pattern cannot divide the weight,
                or the weight does not follow it.
        """
        if not self.fits(pattern):
            raise ValueError(
                f"format '{self.name}' stores {self.stores}, not '{pattern}'. Use format 'auto'."
            )
        return self.encode(weight, pattern)

    def proves(self, pattern: Pattern) -> bool:
        """Whether what it stores with the parameters of an N:M pattern cannot break the pattern."""
        return self.structured and self.fits(pattern) and pattern.implied_sparsity is not None

    def read_layout(self, layout: Tensor) -> Layout:
        """The layout of a weight in this format.

        Raises:
            FormatError: the layout has the wrong type or shape, or holds what no weight has.
        """
        wanted = _FIXED + self.num_parameters
        if layout.dtype != torch.int64 or layout.shape not in ((wanted,), (wanted + 1,)):
            raise FormatError(
                f"'{LAYOUT}' has shape {tuple(layout.shape)} and type {layout.dtype}; wanted "
                f"{wanted} int64 for format '{self.name}', or {wanted + 1} for a stack of matrices"
            )
        rows, columns, transposed, *others = layout.tolist()
        parameters, stacked = others[: self.num_parameters], others[self.num_parameters :]
        found = Layout(self.name, rows, columns, bool(transposed), tuple(parameters), *stacked)
        sizes_fit = 0 <= rows < 2**31 and 0 <= columns < 2**31 and transposed in (0, 1)
        sizes_fit &= 0 <= found.all_rows < 2**31 and found.all_rows * columns <= LARGEST_WEIGHT
        sizes_fit &= found.matrices is None or 0 <= found.matrices < 2**31
        if not sizes_fit or not self.check(rows, columns, *parameters):
            raise FormatError(
                f"'{LAYOUT}' holds {layout.tolist()}, which is no layout of '{self.name}'"
            )
        return found

    def check_direction(self, layout: Layout, transposed: bool) -> None:
        """Refuse a layout of another direction than the layer: of square weights no shape tells it.

        Args:
            layout: of a weight in this format.
            transposed: whether the layer holds its weight as `(in_features, out_features)`.

        Raises:
            FormatError: the weight would come back transposed.
        """
        turned = self.structured or layout.coding is not None
        wanted = turned and transposed
        if layout.transposed != wanted:
            stored = "(out_features, in_features)" if turned else "the weight as it stands"
            raise FormatError(
                f"the layout has transposed={int(layout.transposed)}, its layer wants {int(wanted)}: "
                f"'{layout.coding or self.name}' stores {stored}. The file is damaged: copy or "
                "download it again."
            )


def by_mask(
    name: str, weight: Weight, positions: NDArray[np.uint8], parameters: tuple[int, ...] = ()
) -> Encoded:
    """A weight as its nonzeros and their positions, for formats of any pattern."""

    def parts() -> Parts:
        values = bits.take(weight.flat, weight.mask)
        return _parts(name, values, positions, weight.tensor, layout)

    layout = _layout(weight, weight.tensor.shape[-2:], False, parameters)
    return Encoded(nonzeros_and(weight, positions.nbytes, len(parameters)), parts)


def nonzeros_and(weight: Weight, positions: int, num_parameters: int = 0) -> int:
    """The bytes that `by_mask` takes with so many bytes of positions."""
    stacked = 0 if weight.matrices is None else 1
    numbers = _FIXED + num_parameters + stacked
    return weight.value_bytes(weight.num_nonzeros) + positions + 8 * numbers


def as_it_is(weight: Weight) -> Encoded:
    """A weight with its zeros; with a layout if its values are coded, for they are packed then."""
    if weight.value_bits is None:
        return Encoded(weight.tensor.nbytes, lambda: {"": weight.tensor})
    layout = _layout(weight, weight.tensor.shape[-2:], False, ())
    nbytes = weight.value_bytes(weight.tensor.numel()) + layout.nbytes
    return Encoded(nbytes, lambda: {"": weight.tensor.reshape(-1), LAYOUT: layout})


def by_groups(
    name: str,
    weight: Weight,
    values: Bits,
    positions: NDArray[np.uint8],
    parameters: tuple[int, ...],
) -> Encoded:
    """A weight as the values of its groups and their positions, for structured formats."""
    layout = _layout(weight, weight.matrix_shape, weight.transposed, parameters)
    parts = _parts(name, values, positions, weight.oriented, layout)
    nbytes = weight.value_bytes(values.size) + positions.nbytes + layout.nbytes
    return Encoded(nbytes, lambda: parts)


def num_bytes(parts: Mapping[str, Tensor]) -> int:
    """Bytes that the parts take in a file, headers aside."""
    return sum(part.numel() * part.element_size() for part in parts.values())


def _layout(
    weight: Weight, shape: Sequence[int], transposed: bool, parameters: Iterable[int]
) -> Tensor:
    stacked = [] if weight.matrices is None else [weight.matrices]
    return torch.tensor([*shape, int(transposed), *parameters, *stacked], dtype=torch.int64)


def _parts(
    name: str, values: Bits, positions: NDArray[np.uint8], weight: Tensor, layout: Tensor
) -> Parts:
    return {
        "": bits.as_weight(values, weight.dtype),
        name: torch.from_numpy(np.ascontiguousarray(positions)),
        LAYOUT: layout,
    }
