"""Copies of memory for other addresses: all of it is found, and what is written outside is seen."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from hf_sparse.runtime.weights.memory import Shelf
from tests.support.memory_in_sight import Block, Image, blocks_in_sight

BASE = 1 << 33


@dataclass
class Holder:
    array: np.ndarray
    inner: dict[str, list[torch.Tensor]]


@pytest.fixture
def holder() -> Holder:
    return Holder(np.arange(5, dtype=np.float32), {"x": [torch.arange(6.0)]})


def test_arrays_are_found_through_what_functions_hold(holder: Holder) -> None:
    bound = functools.partial(print, np.zeros(3))
    found = blocks_in_sight(sys._getframe())
    for array in (holder.array, holder.inner["x"][0].numpy(), bound.args[0]):
        (block,) = found.reached([array.ctypes.data])
        assert (block.start, block.nbytes) == (array.ctypes.data, array.nbytes)
        assert not block.words
    assert not found.reached([8])


def test_neighbours_on_a_shelf_are_blocks_of_their_own_and_views_are_not() -> None:
    shelf = Shelf(1 << 10)
    one, other = (shelf.place(np.ones(16, np.float32)) for _ in range(2))
    view = one[4:8]
    del shelf
    found = blocks_in_sight(sys._getframe())
    for array in (one, other):
        (block,) = found.reached([array.ctypes.data + 4])
        assert (block.start, block.nbytes) == (array.ctypes.data, 64)
    assert view.base is not None


def test_addresses_in_words_lead_further_and_are_translated() -> None:
    data = np.arange(10, dtype=np.float32)
    table = np.array([data.ctypes.data + 8, 4, 77], np.int64)
    blocks = blocks_in_sight(sys._getframe()).reached([table.ctypes.data])
    assert len(blocks) == 2
    image = Image(blocks, BASE, {77: 99})
    number = next(n for n, block in enumerate(blocks) if block.words)
    words = image.content(number).view(np.int64)
    start, page = image.pieces[1 - number]
    place = int(words[0]) - start
    assert page[place : place + 4].view(np.float32)[0] == 2
    assert words[1:].tolist() == [4, 99]
    assert int(words[0]) % 64 == (data.ctypes.data + 8) % 64  # kernels rely on alignment
    words[1] = 5
    image.content(1 - number).view(np.float32)[:] = -1
    image.take_back()
    assert table.tolist() == [data.ctypes.data + 8, 5, 77]
    assert (data == -1).all()


@pytest.mark.parametrize("place", [-1, 40, 41])
def test_a_byte_outside_is_seen(place: int) -> None:
    data = np.zeros(10, np.float32)
    image = Image([Block(data.ctypes.data, data.nbytes, words=False)], BASE, {})
    assert not image.damaged()
    content = image.content(0)
    page = image.pieces[0][1]
    first = content.ctypes.data - page.ctypes.data
    page[first + place] += 1
    (found,) = image.damaged()
    assert f"byte {place} of the 40" in found
