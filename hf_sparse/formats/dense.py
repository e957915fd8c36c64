"""Format `dense`: the weight as it is, under its own name, for readers without hf_sparse.

Of a weight whose values are coded it stores the code of every weight, and has no positions.
"""

from __future__ import annotations

from hf_sparse.formats.format import Encoded, Format, Weight, as_it_is
from hf_sparse.patterns import Pattern


def encode(weight: Weight, pattern: Pattern) -> Encoded:
    """The weight itself; of a coded weight, the codes of all weights."""
    return as_it_is(weight)


DENSE = Format(
    "dense",
    "the weight as it is, zeros included",
    encode,
    least=lambda weight: as_it_is(weight).nbytes,
)
