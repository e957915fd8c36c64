"""Which thread has which tile."""

from __future__ import annotations

import pytest

from hf_sparse.runtime.programs.tiling import cut, share


@pytest.mark.parametrize("widths", [(64, 32, 16), (32, 16, 8)])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 128), (8, 128), (3, 77), (1, 5)])
def test_every_token_has_one_tile_and_more_threads_never_take_longer(
    widths: tuple[int, ...], batch: int, tokens: int
) -> None:
    least = float("inf")
    for threads in (1, 2, 4, 8, 16, 64):
        whole = [tile for b in range(batch) for tile in cut(b, tokens, widths)]
        lists = share(whole, threads)
        assert len(lists) == threads
        found = sorted((t.sequence, t.start, t.tokens) for part in lists for t in part)
        ends = [(b, start + count) for b, start, count in found]
        begins = [(b, start) for b, start, _ in found]
        assert [(b, e) for b, e in ends if e < tokens] == [(b, s) for b, s in begins if s]
        assert sum(count for _, _, count in found) == batch * tokens
        time = max(sum(tile.cost for tile in part) for part in lists)
        assert time <= least
        least = time


def test_one_sequence_is_halved_for_more_threads_than_tiles() -> None:
    (tiles, threads) = cut(0, 128, (64, 32, 16)), 4
    assert [len(part) for part in share(tiles, threads)] == [1, 1, 1, 1]
