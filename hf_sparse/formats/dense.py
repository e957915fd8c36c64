"""Format `dense`: the weight as it is, under its own name, for readers without hf_sparse."""

from __future__ import annotations

from hf_sparse.formats.format import Encoded, Format, Weight
from hf_sparse.patterns import Pattern


def encode(weight: Weight, pattern: Pattern) -> Encoded:
    """The weight itself."""
    return Encoded(weight.tensor.nbytes, lambda: {"": weight.tensor})


DENSE = Format(
    "dense",
    "the weight as it is, zeros included",
    encode,
    least=lambda weight: weight.tensor.nbytes,
)
