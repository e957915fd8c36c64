"""Columns of a weight that has too few zeros, as the kernel `dense.py` reads them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_sparse.runtime.kernels.call import Argument, Operation
from hf_sparse.runtime.kernels.dense import ROWS, SIGNATURE, name
from hf_sparse.runtime.kernels.weight_types import WEIGHT_TYPES
from hf_sparse.runtime.weights.columns import Columns


@dataclass(frozen=True, eq=False)
class DenseWeight(Columns[Tensor]):
    """Columns of a weight `(rows, all columns)` of one of the `WEIGHT_TYPES`, contiguous."""

    @staticmethod
    def suits(weight: Tensor) -> bool:
        """Whether a weight's rows go in whole groups."""
        return not weight.shape[0] % ROWS

    @property
    def rows(self) -> int:
        """Features that come out."""
        return self.weight.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of these columns."""
        return self.weight.itemsize * self.stored

    def operation(
        self, chunk: int, vectors: int, x: Argument, y: Argument, bias: int, start: int
    ) -> Operation:
        """Multiply one chunk of rows; addresses as `PackedWeight.operation`'s."""
        weight_type = WEIGHT_TYPES[self.weight.dtype]
        stride = weight_type.size * self.weight.shape[1]
        weight = self.weight.data_ptr() + weight_type.size * self.first_column
        return SIGNATURE.operation(
            name(vectors, weight_type),
            weight=weight,
            row_bytes=stride,
            columns=self.columns,
            **self.rows_of(chunk),
            x=x,
            y=y,
            bias=bias,
            start=start,
        )
