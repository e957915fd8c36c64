"""Patterns against slow references: exact counts, ties by index, and refusals."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from hf_sparse.patterns import (
    NM,
    Block,
    Column,
    Head,
    Pattern,
    Row,
    Unstructured,
    lowest,
)
from tests.support.crosses import cross

EXAMPLES = settings(max_examples=15, deadline=None, derandomize=True)

# Every notation, and the rows and columns of its units in an 8 x 8 weight (N:M has no free units).
UNITS = {
    "unstructured": (1, 1),
    "2:4": None,
    "1:2": None,
    "3:8": None,
    "block:2x4": (2, 4),
    "block:4x1": (4, 1),
    "block:1x8": (1, 8),
    "row": (1, 8),
    "column": (8, 1),
    "head:2": (2, 8),
}
FREE = [notation for notation, unit in UNITS.items() if unit]
FIXED = [notation for notation, unit in UNITS.items() if not unit]
SCORE_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

small_integers = npst.arrays("int64", (8, 8), elements=st.integers(0, 3)).map(torch.from_numpy)
sparsities = st.floats(0, 1, exclude_max=True)


def pruned_by_sorting(scores: list[float], count: int) -> set[int]:
    """The indices of the `count` lowest scores; of equal ones the lower index comes first."""
    return set(sorted(range(len(scores)), key=lambda index: (scores[index], index))[:count])


def keep_slowly(scores, unit, sparsity, per_row):
    """`Pattern.keep` of the free patterns: one unit after the other, in exact arithmetic."""
    height, width = unit
    rows, columns = scores.shape
    across = columns // width
    values = scores.tolist()
    totals = [
        sum(
            Fraction(values[y * height + i][x * width + j]) ** 2
            for i, j in product(range(height), range(width))
        )
        for y, x in product(range(rows // height), range(across))
    ]
    lines = range(0, len(totals), across) if per_row and across > 1 else [0]
    length = across if len(lines) > 1 else len(totals)
    total = round(sparsity * len(totals))
    pruned = {
        start + index
        for line, start in enumerate(lines)
        for index in pruned_by_sorting(
            totals[start : start + length],
            total * (line + 1) // len(lines) - total * line // len(lines),
        )
    }
    return torch.tensor(
        [
            [(r // height) * across + c // width not in pruned for c in range(columns)]
            for r in range(rows)
        ]
    )


@given(
    st.one_of(
        st.sampled_from([Unstructured(), Row(), Column(), Head()]),
        st.tuples(st.integers(1, 9998), st.integers(1, 9999))
        .filter(lambda pair: pair[0] < pair[1])
        .map(lambda pair: NM(*pair)),
        st.builds(Block, st.integers(1, 999999), st.integers(1, 999999)),
        st.builds(Head, st.integers(1, 999999)),
    )
)
@EXAMPLES
def test_parse_undoes_str(pattern):
    assert Pattern.parse(str(pattern)) == pattern
    assert Pattern.parse(pattern) is pattern


@pytest.mark.parametrize("notation", [*UNITS, "head", "4:8", "block:16x1"])
def test_str_gives_the_notation_back(notation):
    assert str(Pattern.parse(notation)) == notation


def test_patterns_of_equal_notation_are_equal_and_hashable():
    assert len({Pattern.parse(notation) for notation in [*UNITS, *UNITS]}) == len(UNITS)
    assert Head(4) != Head() != Row()
    assert Head().with_size(4) == Head(4)


@pytest.mark.parametrize(
    "notation",
    [
        "",
        "Row",
        "rows",
        "2:4 ",
        " 2:4",
        "2:4\n",
        "2-4",
        "2:",
        "٢:٤",
        "block",
        "block:4",
        "block:4X4",
    ]
    + ["block:-1x4", "head:", "head:x", "1.5:4", "2:4:8", None, 4, 0.5, ["row"]],
)
def test_unknown_notation_is_refused_with_the_known_ones(notation):
    with pytest.raises(ValueError, match="pattern") as raised:
        Pattern.parse(notation)
    assert repr(notation) in str(raised.value)
    assert all(known in str(raised.value) for kind in Pattern.kinds() for known in kind.notations)


@pytest.mark.parametrize(
    ("notation", "wanted"),
    [("4:2", "N:M"), ("0:4", "N:M"), ("4:4", "N:M"), ("0:0", "N:M")]
    + [("block:0x4", "block:RxC"), ("block:4x0", "block:RxC"), ("head:0", "head:D")],
)
def test_sizes_out_of_range_are_refused(notation, wanted):
    with pytest.raises(ValueError, match=wanted) as raised:
        Pattern.parse(notation)
    assert f"'{notation}'" in str(raised.value)


@given(st.text(alphabet="0123456789:x-. blockheadrwumnstcui\n", max_size=12))
@EXAMPLES
def test_any_text_is_a_pattern_or_a_value_error(text):
    with suppress(ValueError):
        pattern = Pattern.parse(text)
        assert Pattern.parse(str(pattern)) == pattern


def test_implied_sparsity():
    assert NM(2, 4).implied_sparsity == 0.5
    assert NM(1, 16).implied_sparsity == 0.9375
    assert all(Pattern.parse(notation).implied_sparsity is None for notation in FREE)


@pytest.mark.few(6)
@pytest.mark.parametrize("notation", FREE)
@pytest.mark.parametrize("per_row", [False, True])
@given(scores=small_integers, sparsity=sparsities)
@EXAMPLES
def test_keep_of_tied_scores_equals_the_slow_reference(notation, per_row, scores, sparsity):
    kept = Pattern.parse(notation).keep(scores, sparsity, per_row=per_row)
    assert torch.equal(kept, keep_slowly(scores, UNITS[notation], sparsity, per_row))


@pytest.mark.parametrize("notation", FREE)
@pytest.mark.parametrize("dtype", SCORE_TYPES)
def test_keep_of_distinct_scores_equals_the_slow_reference(notation, dtype):
    scores = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for sparsity in (0, 0.3, 0.5, 0.9):
        kept = Pattern.parse(notation).keep(scores, sparsity)
        assert torch.equal(kept, keep_slowly(scores, UNITS[notation], sparsity, False))


@pytest.mark.parametrize("notation", FREE)
@given(scores=small_integers, sparsity=sparsities)
@EXAMPLES
def test_keep_prunes_the_exact_count_of_units(notation, scores, sparsity):
    kept = Pattern.parse(notation).keep(scores, sparsity)
    height, width = UNITS[notation]
    units = 64 // (height * width)
    assert kept.dtype == torch.bool
    assert kept.shape == scores.shape
    assert int((~kept).sum()) == round(sparsity * units) * height * width


@given(scores=small_integers, sparsity=sparsities)
@EXAMPLES
def test_per_row_prunes_an_exact_count_evenly_over_the_rows(scores, sparsity):
    pruned = (~Unstructured().keep(scores, sparsity, per_row=True)).sum(dim=1)
    assert int(pruned.sum()) == round(sparsity * 64)
    assert int(pruned.max() - pruned.min()) <= 1


@pytest.mark.parametrize("notation", [*FIXED, "row", "column", "head:2"])
@given(scores=small_integers)
@EXAMPLES
def test_per_row_changes_nothing_where_it_has_no_meaning(notation, scores):
    pattern = Pattern.parse(notation)
    assert torch.equal(pattern.keep(scores, 0.5), pattern.keep(scores, 0.5, per_row=True))


@pytest.mark.parametrize("notation", FIXED)
@given(scores=small_integers)
@EXAMPLES
def test_nm_keeps_the_highest_n_of_each_group(notation, scores):
    pattern = Pattern.parse(notation)
    kept = pattern.keep(scores, 0.0).reshape(-1, pattern.m)
    for group, mask in zip(scores.reshape(-1, pattern.m).tolist(), kept.tolist(), strict=True):
        pruned = pruned_by_sorting(group, pattern.m - pattern.n)
        assert mask == [index not in pruned for index in range(pattern.m)]


def test_nm_equals_brute_force_on_every_small_group():
    groups = torch.tensor(list(product(range(3), repeat=4)), dtype=torch.float32)
    kept = NM(2, 4).keep(groups, 0.5)
    assert (kept.sum(dim=1) == 2).all()
    best = torch.stack(
        [
            groups[:, list(pair)].sum(dim=1)
            for pair in product(range(4), repeat=2)
            if len({*pair}) == 2
        ]
    ).amax(dim=0)
    assert torch.equal((groups * kept).sum(dim=1), best)


@pytest.mark.parametrize("notation", list(UNITS))
@given(scores=small_integers, sparsity=sparsities)
@EXAMPLES
def test_what_is_kept_follows_the_pattern(notation, scores, sparsity):
    pattern = Pattern.parse(notation)
    weight = torch.full((8, 8), -0.5) * pattern.keep(scores, sparsity)
    assert pattern.follows(weight)


@pytest.mark.parametrize("notation", list(UNITS))
@given(weight=small_integers)
@EXAMPLES
def test_violations_equal_a_count_by_hand(notation, weight):
    pattern = Pattern.parse(notation)
    if isinstance(pattern, NM):
        groups = weight.reshape(-1, pattern.m).tolist()
        expected = sum(sum(value != 0 for value in group) > pattern.n for group in groups)
    else:
        height, width = UNITS[notation]
        tiles = [
            weight[y : y + height, x : x + width].flatten().tolist()
            for y in range(0, 8, height)
            for x in range(0, 8, width)
        ]
        expected = sum(0 < sum(value != 0 for value in tile) < height * width for tile in tiles)
    assert pattern.violations(weight) == expected
    assert pattern.follows(weight) == (expected == 0)


def test_nan_is_no_zero_and_negative_zero_is_one():
    nan, zero = float("nan"), -0.0
    assert NM(2, 4).violations(torch.tensor([[nan, nan, nan, 0.0], [1.0, 1.0, zero, zero]])) == 1
    assert Row().violations(torch.tensor([[nan, 0.0], [zero, 0.0]])) == 1


@pytest.mark.parametrize("notation", list(UNITS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_scores_are_refused(notation, bad):
    scores = torch.ones(8, 8)
    scores[3, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        Pattern.parse(notation).keep(scores, 0.5)


@cross("sparsity, notation", [-0.01, 1.0, 1.5, float("nan"), float("inf")], list(UNITS))
def test_sparsity_outside_zero_and_one_is_refused(notation, sparsity):
    with pytest.raises(ValueError, match=str(sparsity)):
        Pattern.parse(notation).keep(torch.ones(8, 8), sparsity)


@pytest.mark.parametrize("notation", list(UNITS))
@pytest.mark.parametrize("shape", [(), (8,), (8, 8, 8)])
def test_scores_that_are_no_matrix_are_refused(notation, shape):
    with pytest.raises(ValueError, match="wanted \\(out_features, in_features\\)"):
        Pattern.parse(notation).keep(torch.ones(shape), 0.5)


@pytest.mark.parametrize(
    ("notation", "shape"),
    [
        ("2:4", (4, 6)),
        ("3:8", (8, 4)),
        ("block:2x4", (3, 8)),
        ("block:2x4", (4, 6)),
        ("head:3", (4, 4)),
    ],
)
def test_indivisible_shapes_are_refused(notation, shape):
    pattern = Pattern.parse(notation)
    with pytest.raises(ValueError, match=f"'{notation}'"):
        pattern.keep(torch.ones(shape), 0.5)
    with pytest.raises(ValueError, match=f"'{notation}'"):
        pattern.violations(torch.ones(shape))


def test_head_without_a_size_is_refused():
    with pytest.raises(ValueError, match="head:64"):
        Head().keep(torch.ones(8, 8), 0.5)


@pytest.mark.parametrize("notation", list(UNITS))
@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_empty_weights_have_an_empty_mask(notation, shape):
    pattern = Pattern.parse(notation)
    assert pattern.keep(torch.zeros(shape), 0.5).shape == shape
    assert pattern.follows(torch.zeros(shape))


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e25, 1e37])
def test_squares_of_group_scores_neither_overflow_nor_vanish(scale):
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0]]) * scale
    assert Column().keep(scores, 0.5).tolist() == [[True, False, True, False]]


def test_double_scores_are_compared_as_doubles():
    scores = torch.tensor([[1 + 1e-12, 1.0]], dtype=torch.float64)
    assert Unstructured().keep(scores, 0.5).tolist() == [[True, False]]
    assert Column().keep(scores, 0.5).tolist() == [[True, False]]


@given(
    scores=npst.arrays("float32", (3, 11), elements=st.sampled_from([0.0, -0.0, 1.0, 1.5, 2.0])),
    count=st.integers(0, 11),
)
@EXAMPLES
def test_lowest_equals_a_stable_sort(scores, count):
    scores = torch.from_numpy(scores)
    order = scores.argsort(dim=1, stable=True)
    expected = torch.zeros(scores.shape, dtype=torch.bool)
    expected.scatter_(1, order[:, :count], True)
    assert torch.equal(lowest(scores, count), expected)


def test_keep_leaves_the_scores_as_they_were():
    scores = torch.arange(64.0).reshape(8, 8)
    for notation in UNITS:
        Pattern.parse(notation).keep(scores, 0.5)
    assert torch.equal(scores, torch.arange(64.0).reshape(8, 8))
