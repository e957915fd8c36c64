"""Format `auto`: the smallest of the others that can hold the weight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from hf_sparse.formats.format import Encoded, Format, Weight
from hf_sparse.patterns import Pattern


def smallest_of(formats: Sequence[Format]) -> Format:
    """The format `auto` over others.

    Args:
        formats: `dense` is among them. Of formats of one size structured ones win, and `dense` loses.
    """
    ordered = sorted(formats, key=lambda form: (form.decode is None, not form.structured))
    return Format("auto", "the smallest of the others", partial(_encode, ordered))


def _encode(formats: Sequence[Format], weight: Weight, pattern: Pattern) -> Encoded:
    best = None
    # What is larger than the dense weight is not the smallest.
    worth = min(form.least(weight) for form in formats if form.decode is None)
    for form in formats:
        tried = form.fits(pattern) and form.offered(weight)
        if not tried or form.least(weight) > worth:
            continue
        try:
            encoded = form.encode(weight, pattern)
        except (
            ValueError
        ):  # the pattern does not divide the weight, or the weight does not follow it
            continue
        if encoded.nbytes <= worth:
            best, worth = encoded, encoded.nbytes - 1
    assert best is not None  # dense holds every weight
    return best
