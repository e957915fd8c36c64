"""Columns of a weight that has too few zeros, as the kernel `dense.py` reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hf_sparse.runtime.kernels.call import Argument, Operation
from hf_sparse.runtime.kernels.dense import ROWS, SIGNATURE, name
from hf_sparse.runtime.kernels.weight_types import WEIGHT_TYPES
from hf_sparse.runtime.weights.panels import CHUNK_ROWS, chunk_edges


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """Columns of a weight that is computed densely; stands beside `PackedWeight`.

    Attributes:
        weight: `(rows, all columns)` of one of the `WEIGHT_TYPES`, contiguous.
        first_column, columns: which columns.
    """

    weight: Tensor
    first_column: int
    columns: int
    height: int = ROWS

    @staticmethod
    def suits(weight: Tensor) -> bool:
        """Whether a weight's rows go in whole groups."""
        return not weight.shape[0] % ROWS

    @property
    def rows(self) -> int:
        """Features that come out."""
        return self.weight.shape[0]

    @property
    def stored(self) -> int:
        """Weights that are multiplied."""
        return self.rows * self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of these columns."""
        return self.weight.itemsize * self.stored

    @property
    def chunk_rows(self) -> NDArray[np.int64]:
        """Where the chunks of rows begin, and where the last one ends."""
        return chunk_edges(self.rows)

    def operation(
        self, chunk: int, vectors: int, x: Argument, y: Argument, bias: int, start: int
    ) -> Operation:
        """Multiply one chunk of rows; addresses as `PackedWeight.operation`'s."""
        first = chunk * CHUNK_ROWS
        last = min(first + CHUNK_ROWS, self.rows)
        weight_type = WEIGHT_TYPES[self.weight.dtype]
        stride = weight_type.size * self.weight.shape[1]
        weight = self.weight.data_ptr() + weight_type.size * self.first_column
        return SIGNATURE.operation(
            name(vectors, weight_type),
            weight=weight,
            row_bytes=stride,
            columns=self.columns,
            first=first,
            last=last,
            x=x,
            y=y,
            bias=bias,
            start=start,
        )
