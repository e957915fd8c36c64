"""Columns of a weight of few bits, as tiles are multiplied with them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_sparse.runtime.kernels.byte_tiles import BYTE_TILES, name
from hf_sparse.runtime.kernels.call import Argument, Operation
from hf_sparse.runtime.kernels.code_formats import BLOCK, FORMATS
from hf_sparse.runtime.kernels.dense import ROWS as SIDE_BY_SIDE
from hf_sparse.runtime.weights.codes import CodeWeight
from hf_sparse.runtime.weights.panels import CHUNK_ROWS, chunk_edges


@dataclass(frozen=True, eq=False)
class CodePart:
    """Columns of a weight of few bits; stands beside `PackedWeight` and `DenseWeight`.

    Attributes:
        weight: all of it; single tokens read the same.
        first_column, columns: which columns; the first one begins a block.
    """

    weight: CodeWeight
    first_column: int
    columns: int
    height: int = SIDE_BY_SIDE

    @property
    def rows(self) -> int:
        """Features that come out."""
        return self.weight.rows

    @property
    def stored(self) -> int:
        """Weights that are multiplied: zeros, too."""
        return self.rows * self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of these columns."""
        first, last = self.first_column // BLOCK, -(-(self.first_column + self.columns) // BLOCK)
        edges = [self.weight.nbytes * block // self.weight.blocks for block in (first, last)]
        return edges[1] - edges[0]

    @property
    def chunk_rows(self) -> NDArray[np.int64]:
        """Where the chunks of rows begin, and where the last one ends."""
        return chunk_edges(self.rows)

    def operation(
        self, chunk: int, vectors: int, x: Argument, y: Argument, bias: int, start: int
    ) -> Operation:
        """Multiply one chunk of rows; addresses as `PackedWeight.operation`'s, `x` of eight bits."""
        first = chunk * CHUNK_ROWS
        return BYTE_TILES.operation(
            name(vectors),
            format=FORMATS.index(self.weight.form),
            **self.weight.at(0, self.first_column // BLOCK),
            starts=self.weight.starts_at(self.first_column // BLOCK),
            row_blocks=self.weight.blocks,
            columns=self.columns,
            first=first,
            last=min(first + CHUNK_ROWS, self.rows),
            x=x,
            y=y,
            bias=bias,
            start=start,
        )
