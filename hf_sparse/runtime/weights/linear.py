"""A weight matrix, packed for the kernel that suits its zeros."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hf_sparse.arguments import check_finite
from hf_sparse.quantization import OffGridError
from hf_sparse.runtime.kernels import spmm
from hf_sparse.runtime.kernels.call import Argument, Operation
from hf_sparse.runtime.kernels.dense import ROWS
from hf_sparse.runtime.kernels.shuffled_rows import Window
from hf_sparse.runtime.kernels.single_token import GROUP
from hf_sparse.runtime.kernels.weight_types import WEIGHT_TYPES
from hf_sparse.runtime.weights.code_part import CodePart
from hf_sparse.runtime.weights.codes import CodeWeight
from hf_sparse.runtime.weights.dense_weight import DenseWeight
from hf_sparse.runtime.weights.memory import Shelf, aligned
from hf_sparse.runtime.weights.panels import PackedWeight, pack_many
from hf_sparse.runtime.weights.rates import DENSE, Rates
from hf_sparse.runtime.weights.rounding import Coding, pack_nearest
from hf_sparse.runtime.weights.single_rows import (
    SingleWeight,
    can_share,
    choose_kernel,
    pack_single,
    row_operation,
)
from hf_sparse.runtime.weights.zero_pattern import find_pattern

# What multiplies tiles.
TileWeight = PackedWeight | DenseWeight | CodePart


@dataclass(frozen=True, eq=False)
class Linear:
    """`y = W x + bias` on tiles.

    Attributes:
        name: what the user calls the layer.
        pattern: what its zeros follow, `dense` without zeros.
        parts: the weight, cut into ranges of columns that are multiplied one after the other; each
            is the sum of packed weights, for whose zeros different kernels suit.
        edges: `len(parts) + 1` columns, where the parts begin and end.
        bias: `(rows,)`, or None.
        zeros: weights that are zero.
        dtype: of the weight, a key of `WEIGHT_TYPES`; packed values have it too, but for blocks, and
            for weights of few bits.
        single: the weight for single tokens: packed, or as it is, `(rows, columns)` in whole
            vectors; None if there are no single tokens.
    """

    name: str
    pattern: str
    parts: tuple[tuple[TileWeight, ...], ...]
    edges: tuple[int, ...]
    bias: Tensor | None
    zeros: int
    dtype: torch.dtype
    single: SingleWeight | None = None

    @property
    def rows(self) -> int:
        """Features that come out."""
        return self.parts[0][0].rows

    @property
    def columns(self) -> int:
        """Features that go in."""
        return self.edges[-1]

    @property
    def sparsity(self) -> float:
        """The fraction of weights that are zero."""
        return self.zeros / (self.rows * self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight; what tiles and single tokens share once."""
        rows_weight = 0 if self.single is None or self.shares else self.single.nbytes
        return sum(packed.nbytes for packed in self.packed) + rows_weight

    @property
    def is_dense(self) -> bool:
        """Whether all of it is computed densely."""
        return isinstance(self.parts[0][0], DenseWeight)

    @property
    def shares(self) -> bool:
        """Whether single tokens read the same weight as tiles."""
        first = self.parts[0][0]
        return not isinstance(first, PackedWeight) and first.weight is self.single

    @property
    def codes(self) -> CodeWeight | None:
        """The weight, if it is one of few bits."""
        first = self.parts[0][0]
        return first.weight if isinstance(first, CodePart) else None

    @property
    def packed(self) -> list[TileWeight]:
        """All packed weights."""
        return [packed for part in self.parts for packed in part]

    @property
    def kernel(self) -> str:
        """The kernels that multiply it."""
        if self.is_dense:
            return "dense"
        if self.codes is not None:
            return self.codes.form.name
        heights = dict.fromkeys(f"{packed.height}x1" for packed in self.packed)
        return f"spmm {' + '.join(heights)}"

    def operations(
        self,
        x: Argument,
        y: Argument,
        vectors: int,
        *,
        add: bool = False,
        part: int = 0,
        chunk: int | None = None,
    ) -> list[Operation]:
        """Multiply one part's columns, all rows or one chunk of them.

        Args:
            x: address of the tile that holds the part's columns.
            y: address of the whole output tile.
            vectors: width of the tiles.
            add: onto what is in `y`. The bias comes with the first part.
            part: which columns.
            chunk: which rows, all by default.
        """
        summands = self.parts[part]
        bias = self.bias if part == 0 else None
        if bias is None:
            if not add and part == 0:
                bias = self.no_bias
            start = spmm.START_SUM if bias is None else spmm.START_BIAS
        else:
            start = spmm.START_SUM_BIAS if add else spmm.START_BIAS
        bias_address = 0 if bias is None else bias.data_ptr()
        chunks = range(len(self.chunk_rows)) if chunk is None else (chunk,)
        found: list[Operation] = []
        for number in chunks:
            for packed in summands:
                mode = start if packed is summands[0] else spmm.START_SUM
                found.append(packed.operation(number, vectors, x, y, bias_address, mode))
        return found

    def row_operation(
        self, x: int, y: int, first: int, last: int, *, add: bool = False
    ) -> Operation:
        """Multiply rows `first` to `last` (multiples of `SHARED_ROWS`, or all) with one token.

        Args:
            x: address of the token's features, in whole vectors; for codes, in eight bits.
            y: address of all output features.
            first, last: which rows.
            add: onto what is in `y`.
        """
        assert self.single is not None
        bias = 0 if self.bias is None else self.bias.data_ptr()
        return row_operation(self.single, x, y, bias, first, last, add=add)

    @functools.cached_property
    def no_bias(self) -> Tensor:
        """Zeros in place of a bias, which layers of one size share."""
        return _no_bias(self.rows)

    @property
    def chunk_rows(self) -> list[tuple[int, int]]:
        """First and last (exclusive) row of each chunk."""
        return list(pairwise(self.parts[0][0].chunk_rows.tolist()))


@functools.cache
def _no_bias(rows: int) -> Tensor:
    return aligned(rows)


def split_by_kernel(weight: np.ndarray, rates: Rates) -> list[tuple[int, np.ndarray]]:
    """Cut a weight into a sum of weights, each for a kernel.

    Either one kernel takes all of it, or the pairs of rows that happen to be nonzero in the same
    column go to the kernel for 2 x 1 blocks, which loads that column once for both, and the rest to
    the one for single weights: whatever is predicted to be fastest.

    Args:
        weight: `(rows, columns)`.
        rates: speed of the kernels.

    Returns:
        Heights of blocks and weights of the same shape, which sum up to `weight`. Height 0 stands
        for the dense kernel.
    """
    rows, columns = weight.shape
    nonzero = weight != 0
    of_weights = np.count_nonzero(nonzero) / max(nonzero.size, 1)
    seconds: dict[tuple[int, ...], float] = {}
    if rows % ROWS == 0:  # the first of those that are as fast: it needs no packing
        seconds[(0,)] = 1 / rates.rate(4, 1.0)
    seconds[(1,)] = of_weights / rates.rate(1, of_weights)
    for height in sorted(spmm.UNROLL):
        if height > 1 and rows % height == 0 and columns <= 1 << 16:
            some = nonzero.reshape(rows // height, height, columns).any(axis=1)
            density = np.count_nonzero(some) / max(some.size, 1)
            seconds[(height,)] = density / rates.rate(height, density)
    if rows % 2 == 0:
        both = nonzero[::2] & nonzero[1::2]
        density = np.count_nonzero(both) / max(both.size, 1)
        rest = of_weights - density
        seconds[2, 1] = density / rates.rate(2, density) + rest / rates.rate(1, rest)
    best = min(seconds, key=lambda heights: seconds[heights])
    if len(best) == 1:
        return [(best[0], weight)]
    paired = np.repeat(both, 2, axis=0)
    return [(2, np.where(paired, weight, 0)), (1, np.where(paired, 0, weight))]


def pack_linear(
    name: str,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    column_chunk: int | None = None,
    rows_shelf: Shelf | None = None,
    shelf: Shelf,
    rates: Rates,
    coding: Coding | None = None,
) -> Linear:
    """Pack a weight `(out_features, in_features)`.

    Args:
        name: of the layer.
        weight: any float type; kept as it is if it is one of the `WEIGHT_TYPES`, else as float32.
        bias: `(out_features,)` or None.
        column_chunk: multiply this many columns at a time, as separate parts.
        rows_shelf: also pack it for single tokens, on this shelf.
        shelf: where the packed weight is put.
        rates: speed of the kernels, by which the one to use is chosen.
        coding: keep codes in place of the weight.

    Raises:
        OffGridError: the weight is not on the grid on which it should be.
        ValueError: the weight or the bias has values that are not finite.
    """
    if weight.dtype not in WEIGHT_TYPES:
        weight = weight.float()
    weight, weight_type = weight.detach().contiguous(), WEIGHT_TYPES[weight.dtype]
    for tensor, part in ((weight, "weight"), (bias, "bias")):
        if tensor is not None:
            check_finite(f"{name}: its {part}", tensor)
    columns = weight.shape[1]
    edges = tuple(range(0, columns, column_chunk or columns)) + (columns,)
    if coding is not None:
        coded = _coded(name, weight, bias, edges, coding, rates, rows_shelf or shelf)
        if coded is not None:
            return coded if rows_shelf is not None else replace(coded, single=None)
    array = weight.float().numpy()
    zeros = array.size - int(np.count_nonzero(array))
    summands = split_by_kernel(array, rates)
    kernel: str | Window = ""
    if rows_shelf is not None:
        kernel = choose_kernel(array, zeros, weight_type, rates.rows)
    columns_of = list(pairwise(edges))
    parts: tuple[tuple[TileWeight, ...], ...]
    if summands[0][0] == 0:
        parts = tuple((DenseWeight(weight, start, stop - start),) for start, stop in columns_of)
        if kernel == DENSE and can_share(array):
            return Linear(
                name, _label(weight), parts, edges, _padded(bias), zeros, weight_type.dtype, weight
            )
    else:
        wanted = [
            (part[:, start:stop], height) for start, stop in columns_of for height, part in summands
        ]
        threads, panel = torch.get_num_threads(), rates.panel_columns
        packed = [one.on(shelf) for one in pack_many(wanted, threads, weight_type, panel)]
        each = len(summands)
        parts = tuple(tuple(packed[i : i + each]) for i in range(0, len(packed), each))
    rows_weight = None
    if rows_shelf is not None:
        rows_weight = pack_single(array, kernel, weight_type, rows_shelf)
    return Linear(
        name, _label(weight), parts, edges, _padded(bias), zeros, weight_type.dtype, rows_weight
    )


def _coded(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    edges: tuple[int, ...],
    coding: Coding,
    rates: Rates,
    shelf: Shelf,
) -> Linear | None:
    """A weight as codes of a grid; None if kernels have no room for them."""
    try:
        found = coding.codes(weight)
    except OffGridError as error:
        raise OffGridError(f"{name}: {error}") from error
    codes = pack_nearest(found, coding.grid, rates.rows, shelf)
    if codes is None:
        return None
    parts = tuple((CodePart(codes, first, last - first),) for first, last in pairwise(edges))
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    return Linear(name, _label(weight), parts, edges, _padded(bias), zeros, weight.dtype, codes)


def _label(weight: Tensor) -> str:
    pattern = find_pattern(weight)
    return "dense" if pattern is None else str(pattern)


def _padded(bias: Tensor | None) -> Tensor | None:
    """A bias with zeros up to a whole group of rows, which the kernels read at once."""
    if bias is None:
        return None
    padded = aligned(-(-len(bias) // GROUP) * GROUP)
    padded[: len(bias)] = bias.detach()
    return padded
