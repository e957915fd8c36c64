"""The crosses of axes: what the fast suite has of them, and that the slow one has the rest."""

from __future__ import annotations

import itertools

import pytest

from tests.support.crosses import covering, cross, pairwise, spread


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1, 4), (2, 3, 4), (5, 5, 2, 2), (1, 1), (11, 8, 2)])
def test_all_pairs_are_met_by_few(sizes: tuple[int, ...]) -> None:
    chosen = covering(sizes)
    for one, other in itertools.combinations(range(len(sizes)), 2):
        met = {(place[one], place[other]) for place in chosen}
        assert len(met) == sizes[one] * sizes[other]
    largest, second = sorted(sizes)[-1], sorted(sizes)[-2]
    assert largest * second <= len(chosen) <= 1.5 * largest * second


def test_fast_and_slow_together_are_the_whole_cross() -> None:
    flags = [(True, "x"), (False, "y")]
    axes = ("abc", [1, 2], flags)
    whole = {(name, number, *flag) for name in "abc" for number in (1, 2) for flag in flags}
    for choose, fast in ((cross, 3), (pairwise, 6)):
        cases = choose("name, number, flag, other", *axes).args[1]
        assert {case.values for case in cases} == whole
        assert len(cases) == len(whole)
        assert sum(not case.marks for case in cases) == fast


@pytest.mark.parametrize(
    ("length", "count"), [(1, 1), (1, 3), (2, 1), (5, 2), (7, 3), (40, 39), (4, 4)]
)
def test_few_cases_are_spread_from_the_first_to_the_last(length: int, count: int) -> None:
    places = sorted(spread(length, count))
    assert len(places) == min(length, count)
    assert places[0] == 0
    assert count == 1 or places[-1] == length - 1
    gaps = [later - sooner for sooner, later in itertools.pairwise(places)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
