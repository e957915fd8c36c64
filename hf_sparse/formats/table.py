"""FORMATS: what `format=` accepts. A new format is one file and one row here."""

from __future__ import annotations

from hf_sparse.formats.bitmask import BITMASK
from hf_sparse.formats.block import BLOCK
from hf_sparse.formats.dense import DENSE
from hf_sparse.formats.format import LAYOUT, Format
from hf_sparse.formats.gap import GAP4, GAP8
from hf_sparse.formats.nm import NM_RANKS
from hf_sparse.formats.smallest import smallest_of

_ROWS = (
    DENSE,
    BITMASK,
    GAP4,
    GAP8,
    NM_RANKS,
    BLOCK,
)
FORMATS: dict[str, Format] = {form.name: form for form in (smallest_of(_ROWS), *_ROWS)}
# The names of the parts that a weight may have beside its values.
COMPANIONS = (*(form.name for form in _ROWS if form.decode is not None), LAYOUT)
