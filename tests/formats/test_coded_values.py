"""Coded values: exact with every format, near their bound, and refused where they are damaged."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse.formats import (
    CODINGS,
    FORMATS,
    FormatError,
    codes_in,
    compress,
    decompress,
    num_bytes,
)
from hf_sparse.patterns import NM, Pattern
from hf_sparse.quantization import Grid, OffGridError, codes_of, rounded
from tests.support.crosses import pairwise
from tests.support.damaged_parts import decompressed_unless_refused

PATTERNS = {"nm": "2:4", "block": "block:2x4"}
PLACED = [name for name in FORMATS if name != "auto"]


def grid_weight(grid, pattern="unstructured", rows=12, columns=128, sparsity=0.5, seed=0):
    """A weight on a grid, not around zero, with a row of zeros."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).add_(0.2)
    weight *= Pattern.parse(pattern).keep(weight.abs(), sparsity)
    weight[2:4] = 0
    return rounded(weight, grid)


@pytest.mark.few(9)
@pairwise(
    "name, bits, size, symmetric, transposed, matrices, dtype",
    ["auto", *PLACED],
    [8, 4],
    [None, 128, 64, 32],
    [True, False],
    [True, False],
    [None, 1, 3],
    [torch.float32, torch.bfloat16, torch.float16],
)
def test_round_trip_is_exact(name, bits, size, symmetric, transposed, matrices, dtype):
    grid = Grid(bits, size, symmetric)
    pattern = PATTERNS.get(name, "unstructured")
    parts = [grid_weight(grid, pattern, seed=seed) for seed in range(matrices or 1)]
    exact = parts[0] if matrices is None else torch.stack(parts)
    exact = exact.mT.contiguous() if transposed else exact
    stored = compress(
        exact.to(dtype), name, Pattern.parse(pattern), transposed=transposed, grid=grid
    )
    assert stored[""].dtype == torch.uint8
    assert f"scales{bits}" in stored
    assert ("zero_points" in stored) is not symmetric
    found = decompress(stored)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert torch.equal(found.to(dtype), exact.to(dtype))
    if dtype == torch.float32:
        assert torch.equal(found, exact)


@pytest.mark.parametrize("grid", [Grid(8, 32), Grid(4, 32), Grid(4, 32, False)], ids=str)
def test_the_codes_are_those_of_the_weight(grid):
    weight = grid_weight(grid)
    wanted = codes_of(weight, grid)
    found = codes_in(compress(weight, grid=grid))
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.scales, wanted.scales)


@pytest.mark.few(7)
@pytest.mark.parametrize("shape", [(1, 32), (3, 32), (0, 32), (4, 0), (5, 96)])
@pytest.mark.parametrize("name", ["auto", "dense", "bitmask", "gap4", "rice"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_odd_shapes(shape, name, symmetric):
    for grid in (Grid(4, 32, symmetric), Grid(8, None, symmetric), Grid(4, None, symmetric)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        weight[..., ::3] = 0
        weight = rounded(weight, grid) if weight.numel() else weight
        assert torch.equal(decompress(compress(weight, name, grid=grid)), weight)


@pytest.mark.few(6)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
def test_size_is_near_the_bound(bits, sparsity):
    grid = Grid(bits, 32)
    weight = torch.rand(768, 384, generator=torch.Generator().manual_seed(1)) + 1
    weight *= torch.rand(768, 384, generator=torch.Generator().manual_seed(2)) >= sparsity
    weight = rounded(weight, grid)
    chance = int(weight.count_nonzero()) / weight.numel()
    entropy = -chance * math.log2(chance) - (1 - chance) * math.log2(1 - chance)
    least = weight.numel() * (chance * bits + entropy + 16 / 32) / 8
    stored = compress(weight, grid=grid)
    assert num_bytes(stored) <= 1.015 * least
    assert torch.equal(decompress(stored), weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_size_of_2_4_is_near_the_bound(bits):
    weight = grid_weight(Grid(bits, 32), "2:4", 768, 384)
    least = weight.numel() * (bits / 2 + math.log2(6) / 4 + 16 / 32) / 8
    stored = compress(weight, "auto", NM(2, 4), grid=Grid(bits, 32))
    assert "nm" in stored
    assert num_bytes(stored) <= 1.01 * least


@pytest.mark.slow
@pytest.mark.parametrize("notation", ["unstructured", "2:4", "block:2x4"])
@given(sparsity=st.floats(0, 1), bits=st.sampled_from([8, 4]), transposed=st.booleans())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_auto_is_never_larger_than_another_format(notation, sparsity, bits, transposed):
    grid, pattern = Grid(bits, 32), Pattern.parse(notation)
    weight = torch.arange(1.0, 1 + 8 * 64).view(8, 64)
    weight *= pattern.keep(weight, min(sparsity, 0.999))
    weight = rounded(weight, grid)
    stored = weight.T.contiguous() if transposed else weight
    smallest = num_bytes(compress(stored, "auto", pattern, transposed=transposed, grid=grid))
    for name in PLACED:
        try:
            parts = compress(stored, name, pattern, transposed=transposed, grid=grid)
        except ValueError:
            continue
        assert smallest <= num_bytes(parts)


def test_a_weight_off_the_grid_is_refused_with_a_count():
    weight = grid_weight(Grid(4, 32))
    weight[5, 40] += 1e-3
    with pytest.raises(OffGridError, match=r"32 of 1,536 weights .*int4, groups of 32"):
        compress(weight, grid=Grid(4, 32))
    with pytest.raises(ValueError, match="group_size 64 does not divide the 96 inputs"):
        compress(torch.zeros(4, 96), grid=Grid(8, 64))


def valid_parts(name="bitmask", grid=None):
    grid = Grid(8, 32) if grid is None else grid
    pattern = PATTERNS.get(name, "unstructured")
    weight = grid_weight(grid, pattern, rows=5 if name != "block" else 6, columns=64)
    return compress(weight, name, Pattern.parse(pattern), grid=grid)


def refused(parts, message):
    with pytest.raises(FormatError, match=message):
        decompress(parts)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), -0.0])
def test_scales_that_are_no_positive_numbers_are_refused(value):
    parts = valid_parts()
    parts["scales8"][1, 1] = value
    refused(parts, r"1 of 10 scales in 'scales8' are zero, negative, too small, too large or NaN")


def test_scales_of_4_bits_may_be_negative_but_for_zero_points():
    parts = valid_parts(grid=Grid(4, 32))
    weight = decompress(parts)
    parts["scales4"][1, 1] *= -1
    weight[1, 32:64] *= -1
    assert torch.equal(decompress(parts), weight)
    parts["scales4"][1, 1] = -0.0
    refused(parts, r"1 of 10 scales in 'scales4' are zero, too small, .*, or their opposites")
    parts = valid_parts(grid=Grid(4, 32, False))
    parts["scales4"][1, 1] *= -1
    refused(parts, r"1 of 10 scales in 'scales4' are zero, negative, too small, too large or NaN")


def test_scales_of_other_shapes_are_refused():
    parts = valid_parts()
    scales = parts["scales8"]
    for wrong in (scales[:-1], scales[None], scales.reshape(-1), scales.float(), scales.half()):
        refused({**parts, "scales8": wrong}, "wanted bfloat16 of shape")
    for groups in (0, 3, 4, 64, 5):
        wrong = torch.ones(5, groups, dtype=torch.bfloat16)
        refused({**parts, "scales8": wrong}, f"{groups} groups for 64 columns")
    missing = {name: part for name, part in parts.items() if name != "scales8"}
    refused(missing, "wanted 1-D floats")
    refused({**parts, "scales4": scales}, "found the parts")


def test_codes_out_of_range_are_refused():
    parts = valid_parts()
    parts[""][0] = 128
    refused(parts, "the code -128")
    parts = valid_parts(grid=Grid(8, 32, False))
    parts[""][0] = 128
    assert decompress(parts).isfinite().all()  # with zero points there is no such code


@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("grid", [Grid(8, 32), Grid(4, 32), Grid(4, 32, False)], ids=str)
def test_wrong_counts_are_refused(name, grid):
    parts = valid_parts(name, grid)
    more = torch.zeros(1, dtype=torch.uint8)
    for wrong in (parts[""][:-1], torch.cat([parts[""], more]), parts[""][:0]):
        refused({**parts, "": wrong}, "bytes of values are stored; wanted")
    for wrong in (parts[""].float(), parts[""].view(torch.int8), parts[""][None]):
        refused({**parts, "": wrong}, "wanted 1-D bytes")
    if name in parts:
        refused({**parts, name: parts[name][:-1]}, ".")
        refused({**parts, name: torch.cat([parts[name], more + 1])}, ".")


def test_half_a_byte_behind_the_last_value_is_refused():
    weight = torch.zeros(1, 32)
    weight[0, 3] = 1.0
    parts = compress(weight, "bitmask", grid=Grid(4))
    assert parts[""].tolist() == [8]
    refused({**parts, "": torch.tensor([0x14], dtype=torch.uint8)}, "behind the last one, number 0")
    parts = compress(weight, "bitmask", grid=Grid(4, None, False))
    assert parts["zero_points"].tolist() == [0]
    wrong = torch.tensor([0x10], dtype=torch.uint8)
    refused({**parts, "zero_points": wrong}, "behind the last group, 0")


def test_zero_points_of_other_shapes_are_refused():
    parts = valid_parts(grid=Grid(8, 32, False))
    points = parts["zero_points"]
    for wrong in (points[:-1], torch.cat([points, points]), points.float(), points[None]):
        refused({**parts, "zero_points": wrong}, "wanted 10 bytes for 10 groups")
    without = {name: part for name, part in parts.items() if name != "scales8"}
    refused(without, "found the parts")


def test_rice_codes_out_of_range_are_refused():
    weight = torch.zeros(1, 64)
    weight[0, 63] = 1.0
    parts = compress(weight, "rice")
    assert parts["layout"].tolist() == [1, 64, 0, 5, 1]
    assert parts["rice"].tolist() == [31, 2]

    def coded(*numbers, layout=None):
        layout = [1, 64, 0, 5, 1] if layout is None else layout
        numbers = torch.tensor(numbers, dtype=torch.uint8)
        return {**parts, "rice": numbers, "layout": torch.tensor(layout)}

    refused(coded(31, 4), "out of range for 64 weights")
    refused(coded(63, 2), "zeros behind the last")
    refused(coded(31, 2, 0), "nothing behind the last")
    refused(coded(31, 0), "0 quotients")
    refused(coded(31, 3), "2 quotients")
    refused(coded(31, 2, layout=[1, 64, 0, 5, 2]), "rice places 2 nonzeros, but 1 values")
    refused(coded(31, 2, layout=[1, 64, 0, 31, 1]), "no layout of 'rice'")
    refused(coded(31, 2, layout=[1, 64, 0, 5, -1]), "no layout of 'rice'")
    far = torch.zeros(2**10, dtype=torch.uint8)
    far[-1] = 128
    huge = {**parts, "rice": torch.cat([torch.zeros(4, dtype=torch.uint8), far])}
    refused({**huge, "layout": torch.tensor([2**20, 2**20, 0, 30, 1])}, "out of range")


damages = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "grow"]), st.integers(0, 9999), st.integers(0, 255)),
    min_size=1,
    max_size=3,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACED)
@given(
    damages=damages, bits=st.sampled_from([8, 4]), symmetric=st.booleans(), part=st.integers(0, 9)
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_damaged_parts_give_a_format_error_or_a_weight_on_the_grid(
    name, damages, bits, symmetric, part
):
    parts = valid_parts(name, Grid(bits, 32, symmetric))
    names = sorted(parts)
    for kind, place, value in damages:
        chosen = names[part % len(names)]
        flat = parts[chosen].contiguous()
        raw = flat.view(torch.uint8).reshape(-1).clone()
        if kind == "flip" and raw.numel():
            raw[place % raw.numel()] = value
            parts[chosen] = raw.view(flat.dtype).reshape(flat.shape)
        elif flat.ndim == 1:
            cut = flat[: place % (len(flat) + 1)]
            parts[chosen] = cut if kind == "cut" else torch.cat([flat, flat[:1] + value % 3])
    if (weight := decompressed_unless_refused(parts)) is None:
        return
    assert weight.isfinite().all() or parts[f"scales{bits}"].float().max() > 1e30


@pytest.mark.parametrize("name", ["dense", "nm", "rice"])
def test_every_single_changed_byte_is_refused_or_changes_a_weight(name):
    pattern = Pattern.parse(PATTERNS.get(name, "unstructured"))
    weight = torch.arange(5.0 * 64).view(5, 64) % 6 + 2  # no code is 0 where nothing is pruned
    weight *= pattern.keep(weight, 0.5)
    for grid in (Grid(4, 32), Grid(8, 32, False)):
        parts = compress(weight, name, pattern, grid=grid)
        for part in ("", *({name} & parts.keys())):
            for place in range(parts[part].numel()):
                changed = parts[part].clone()
                changed[place] ^= 1 << place % 8
                try:
                    assert not torch.equal(decompress({**parts, part: changed}), weight)
                except FormatError:
                    continue


def test_a_weight_too_large_for_the_machine_is_refused():
    for name in ("gap4", "rice", "block"):
        parts = valid_parts(name)
        layout = parts["layout"].clone()
        layout[0] = 2**30 if name != "block" else 2**29
        with pytest.raises(FormatError):
            decompress({**parts, "layout": layout})


def test_every_coding_is_a_row_of_its_name():
    assert all(coding.name == name for name, coding in CODINGS.items())
    assert {coding.bits for coding in CODINGS.values()} == {8, 4}
