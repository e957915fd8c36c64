"""FORMATS: what `format=` accepts, and CODINGS of values. A new one is one file and one row here."""

from __future__ import annotations

from hf_sparse.formats.bitmask import BITMASK
from hf_sparse.formats.block import BLOCK
from hf_sparse.formats.codes import SCALES4, SCALES8
from hf_sparse.formats.coding import Coding
from hf_sparse.formats.dense import DENSE
from hf_sparse.formats.format import LAYOUT, Format
from hf_sparse.formats.gap import GAP4, GAP8
from hf_sparse.formats.nm import NM_RANKS
from hf_sparse.formats.rice import RICE
from hf_sparse.formats.smallest import smallest_of

_ROWS = (
    DENSE,
    BITMASK,
    GAP4,
    GAP8,
    NM_RANKS,
    BLOCK,
    RICE,
)
FORMATS: dict[str, Format] = {form.name: form for form in (smallest_of(_ROWS), *_ROWS)}
CODINGS: dict[str, Coding] = {coding.name: coding for coding in (SCALES8, SCALES4)}
# The names of the parts that hold positions; of those that codings add; and of all that a weight may
# have beside its values.
POSITIONS = tuple(form.name for form in _ROWS if form.decode is not None)
CODING_PARTS = tuple(
    dict.fromkeys(part for coding in CODINGS.values() for part in (coding.name, *coding.others))
)
COMPANIONS = (*POSITIONS, *CODING_PARTS, LAYOUT)
