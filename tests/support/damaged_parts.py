"""Parts of compressed weights that were damaged."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hf_sparse.formats import FormatError, decompress


def decompressed_unless_refused(parts: Mapping[str, Tensor]) -> Tensor | None:
    """The weight of parts, which has the shape that their layout tells; None if they are refused."""
    try:
        weight = decompress(dict(parts))
    except FormatError:
        return None
    rows, columns, transposed = parts["layout"].tolist()[:3]
    assert weight.shape == ((columns, rows) if transposed else (rows, columns))
    return weight
