"""Columns of a weight of which every number is multiplied, zeros too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hf_sparse.runtime.kernels.dense import ROWS
from hf_sparse.runtime.weights.panels import CHUNK_ROWS, chunk_edges

Held = TypeVar("Held")


@dataclass(frozen=True, eq=False)
class Columns(ABC, Generic[Held]):
    """Some columns of a weight; stands beside `PackedWeight`.

    Attributes:
        weight: all of it.
        first_column, columns: which columns.
        height: rows that are multiplied side by side.
    """

    weight: Held
    first_column: int
    columns: int
    height: int = ROWS

    @property
    @abstractmethod
    def rows(self) -> int:
        """Features that come out."""

    @property
    def stored(self) -> int:
        """Weights that are multiplied."""
        return self.rows * self.columns

    @property
    def chunk_rows(self) -> NDArray[np.int64]:
        """Where the chunks of rows begin, and where the last one ends."""
        return chunk_edges(self.rows)

    def rows_of(self, chunk: int) -> dict[str, int]:
        """The `first` row of a chunk, and the `last` one (exclusive)."""
        first = chunk * CHUNK_ROWS
        return {"first": first, "last": min(first + CHUNK_ROWS, self.rows)}
