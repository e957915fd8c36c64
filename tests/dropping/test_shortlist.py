"""Blocks that the search of slim_ tries again: the nearest ones of earlier looks alone."""

from __future__ import annotations

from typing import Any

import pytest

from hf_sparse.dropping import blocks
from hf_sparse.dropping.blocks import Choice, by_loss
from hf_sparse.structure.depth import Depth
from tests.support.tiny_models import tiny_model

# The loss without some of six blocks: a number of each, and what two of them do together.
OWN = {0: 5.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 6.0}
TOGETHER = {(1, 2): 9.0, (1, 4): -3.5}


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Which blocks were left out in each look at the data, whose losses are those above."""
    model = tiny_model("llama", num_hidden_layers=6)
    depth, out, seen = Depth.of(model), [()], []

    def skipping(left_out: Any) -> Any:
        out[0] = tuple(sorted(depth.blocks.index(block) for block in left_out))
        return real([])

    def mean_loss(model: Any, batches: Any) -> float:
        gone, out[0] = out[0], ()
        seen.append(gone)
        pairs = [TOGETHER.get((a, b), 0.0) for a in gone for b in gone if a < b]
        return sum(OWN[number] for number in gone) + sum(pairs)

    real = blocks.skipping
    monkeypatch.setattr(blocks, "skipping", skipping)
    monkeypatch.setattr(blocks, "mean_loss", mean_loss)
    monkeypatch.setattr(Depth, "of", classmethod(lambda cls, model: depth))
    return seen


@pytest.mark.parametrize(
    ("shortlist", "removed", "tried"),
    [
        (None, [1, 4, 3], [6, 5, 4]),
        (6, [1, 4, 3], [6, 5, 4]),
        (2, [1, 3, 4], [6, 2, 2]),  # 2 and 3 are nearest to 1, then 4 and 0
    ],
)
def test_only_the_nearest_are_tried_again(
    looks: list[tuple[int, ...]], shortlist: int | None, removed: list[int], tried: list[int]
) -> None:
    depth = Depth.of(tiny_model("llama", num_hidden_layers=6))
    found, losses, every, _ = by_loss(Choice.of(depth, 3), 3, [], shortlist)
    counts = [sum(len(gone) == number for gone in looks) for number in (1, 2, 3)]
    assert (found, counts) == (removed, tried)
    assert every == list(OWN.values())
    assert losses[0] == OWN[1]
