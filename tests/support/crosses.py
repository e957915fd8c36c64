"""Tests over several axes: a part of the crosses in the fast suite, all of them in the slow one."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest

Place = tuple[int, ...]


def cross(names: str, *axes: Iterable[Any], indirect: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Parametrize a test over all combinations of the values of some axes.

    The fast suite goes along a diagonal, which meets every value of every axis; the other
    combinations are marked slow. For axes whose values have nothing to do with each other.

    Args:
        names: of the arguments, as pytest takes them.
        *axes: the values of each argument; a tuple gives several arguments.
        indirect: the arguments that are fixtures, to which the values go.
    """
    listed = [list(axis) for axis in axes]
    steps = range(max(map(len, listed)))
    diagonal = {tuple(s % len(axis) for axis in listed) for s in steps}
    return _parametrize(names, listed, diagonal, indirect)


def pairwise(names: str, *axes: Iterable[Any]) -> pytest.MarkDecorator:
    """The same, where two axes may act on each other: the fast suite meets all pairs of values.

    Whatever two axes there are, each value of one meets each value of the other. What takes three
    axes to go wrong is found by the slow suite.
    """
    listed = [list(axis) for axis in axes]
    return _parametrize(names, listed, covering([len(axis) for axis in listed]))


def covering(sizes: Sequence[int]) -> set[Place]:
    """Few places of a grid such that any two coordinates take all their pairs of values.

    Greedy: each place is the first of those that meet the most pairs which none has met before.
    """
    axes = list(itertools.combinations(range(len(sizes)), 2))
    open_pairs = {
        (one, other, first, second)
        for one, other in axes
        for first in range(sizes[one])
        for second in range(sizes[other])
    }

    def met(place: Place) -> set[tuple[int, int, int, int]]:
        return {(one, other, place[one], place[other]) for one, other in axes} & open_pairs

    chosen: set[Place] = set()
    grid = list(itertools.product(*map(range, sizes)))
    while open_pairs:
        best = max(grid, key=lambda place: len(met(place)))
        open_pairs -= met(best)
        chosen.add(best)
    return chosen


def spread(length: int, count: int) -> set[int]:
    """`count` places of a list, evenly spread from its first to its last."""
    count = min(count, length)
    return {step * (length - 1) // max(count - 1, 1) for step in range(count)}


def _parametrize(
    names: str,
    axes: Sequence[Sequence[Any]],
    fast: Collection[Place],
    indirect: Sequence[str] = (),
) -> pytest.MarkDecorator:
    cases = []
    for place in itertools.product(*(range(len(axis)) for axis in axes)):
        values: list[Any] = []
        for axis, index in zip(axes, place, strict=True):
            value = axis[index]
            values += value if isinstance(value, tuple) else [value]
        cases.append(pytest.param(*values, marks=() if place in fast else pytest.mark.slow))
    return pytest.mark.parametrize(names, cases, indirect=list(indirect))
