"""Columns of a weight of few bits, as tiles are multiplied with them."""

from __future__ import annotations

from dataclasses import dataclass

from hf_sparse.runtime.kernels.byte_tiles import BYTE_TILES, name
from hf_sparse.runtime.kernels.call import Argument, Operation
from hf_sparse.runtime.kernels.code_formats import BLOCK, FORMATS
from hf_sparse.runtime.weights.codes import CodeWeight
from hf_sparse.runtime.weights.columns import Columns


@dataclass(frozen=True, eq=False)
class CodePart(Columns[CodeWeight]):
    """Columns of a weight of few bits, which single tokens read too; the first one begins a block."""

    @property
    def rows(self) -> int:
        """Features that come out."""
        return self.weight.rows

    @property
    def nbytes(self) -> int:
        """Bytes of these columns."""
        first, last = self.first_column // BLOCK, -(-(self.first_column + self.columns) // BLOCK)
        edges = [self.weight.nbytes * block // self.weight.blocks for block in (first, last)]
        return edges[1] - edges[0]

    def operation(
        self, chunk: int, vectors: int, x: Argument, y: Argument, bias: int, start: int
    ) -> Operation:
        """Multiply one chunk of rows; addresses as `PackedWeight.operation`'s, `x` of eight bits."""
        return BYTE_TILES.operation(
            name(vectors),
            format=FORMATS.index(self.weight.form),
            **self.weight.at(0, self.first_column // BLOCK),
            starts=self.weight.starts_at(self.first_column // BLOCK),
            row_blocks=self.weight.blocks,
            columns=self.columns,
            **self.rows_of(chunk),
            x=x,
            y=y,
            bias=bias,
            start=start,
        )
