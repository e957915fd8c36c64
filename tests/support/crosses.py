"""Tests over several axes: every value in the fast suite, every combination in the slow one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def cross(names: str, *axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test over all combinations of the values of some axes.

    The fast suite goes along a diagonal, which meets every value of every axis; the other
    combinations are marked slow.

    Args:
        names: of the arguments, as pytest takes them.
        *axes: the values of each argument; a tuple gives several arguments.
    """
    listed = [list(axis) for axis in axes]
    steps = range(max(map(len, listed)))
    diagonal = {tuple(step % len(axis) for axis in listed) for step in steps}
    cases = []
    for place in itertools.product(*(range(len(axis)) for axis in listed)):
        values: list[Any] = []
        for axis, index in zip(listed, place, strict=True):
            value = axis[index]
            values += value if isinstance(value, tuple) else [value]
        marks = () if place in diagonal else pytest.mark.slow
        cases.append(pytest.param(*values, marks=marks))
    return pytest.mark.parametrize(names, cases)
