"""Formats as values: a format is one `Format`, and `auto` needs no word about it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_sparse.formats import FORMATS, POSITIONS, Format, FormatError, Weight, bits, smallest_of
from hf_sparse.formats.format import Encoded, Layout, by_mask
from hf_sparse.patterns import NM, Block, Pattern, Unstructured


def encode_runs(weight: Weight, pattern: Pattern) -> Encoded:
    """Zeros at the end alone: the number of weights before them, in one byte."""
    return by_mask("prefix", weight, np.array([weight.num_nonzeros], np.uint8))


def decode_runs(values: bits.Bits, positions: bits.Bits, rows: int, columns: int) -> bits.Bits:
    return bits.place(values, np.arange(rows * columns) < positions[0])


PREFIX = Format("prefix", "nonzeros first", encode_runs, decode_runs)


def test_auto_chooses_a_new_format_where_it_is_the_smallest() -> None:
    weight = torch.zeros(16, 16)
    weight[:3] = 1.0
    choice = smallest_of([*(form for name, form in FORMATS.items() if name != "auto"), PREFIX])
    parts = choice.compress(Weight(weight), Unstructured()).parts()
    assert parts.keys() == {"", "prefix", "layout"}
    layout = PREFIX.read_layout(parts["layout"])
    assert layout == Layout("prefix", 16, 16, False, ())
    flat = decode_runs(bits.as_bits(parts[""]), parts["prefix"].numpy(), 16, 16)
    assert torch.equal(bits.as_weight(flat, torch.float32).view(16, 16), weight)


def test_the_bytes_that_are_told_are_those_of_the_parts() -> None:
    weight = Weight(torch.eye(16))
    for name, form in FORMATS.items():
        pattern = {"nm": NM(2, 4), "block": Block(2, 2)}.get(name, Unstructured())
        encoded = form.compress(weight, pattern)
        assert encoded.nbytes == sum(part.nbytes for part in encoded.parts().values())
        assert form.least(weight) <= encoded.nbytes


def test_a_row_says_what_its_name_says() -> None:
    assert all(form.name == name for name, form in FORMATS.items())
    coded = [name for name, form in FORMATS.items() if form.decode is not None]
    assert tuple(coded) == POSITIONS


@pytest.mark.parametrize("name", POSITIONS)
def test_a_layout_that_no_weight_has_is_refused_by_its_format(name: str) -> None:
    numbers = [4, 8, 0, 2, 4][: 3 + FORMATS[name].num_parameters]
    assert FORMATS[name].read_layout(torch.tensor(numbers)).shape == (4, 8)
    assert FORMATS[name].read_layout(torch.tensor([*numbers, 3])).shape == (3, 4, 8)
    for wrong in ([-4, *numbers[1:]], [4, 8, 2, *numbers[3:]], [*numbers, -1], [*numbers, 1, 1]):
        with pytest.raises(FormatError, match=f"'{name}'"):
            FORMATS[name].read_layout(torch.tensor(wrong))
