"""Codes and scales are found again from the weights alone, in every dtype."""

from __future__ import annotations

import pytest
import torch

from hf_sparse.quantization import (
    BITS,
    Grid,
    OffGridError,
    codes_of,
    fitted_scales,
    lies_on,
    nearest_codes,
    rounded,
)

GRIDS = [
    Grid(bits, size, even)
    for bits in BITS
    for size in (None, 128, 64, 32)
    for even in (True, False)
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sparse_weight(rows=24, columns=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight[torch.rand(rows, columns, generator=generator) < 0.5] = 0
    weight[3] = 0
    return weight


def values_on(grid, seed):
    """Random codes and scales: error feedback leaves groups whose largest code is any code."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = 16, 256
    size = grid.columns_per_scale(columns)
    scales = torch.rand(rows, columns // size, 1, generator=generator).add_(0.01).bfloat16().float()
    low = grid.lowest_code if grid.symmetric else -(2 ** (grid.bits - 1))
    high = grid.highest_code if grid.symmetric else 2 ** (grid.bits - 1) - 1
    reach = torch.randint(1, high + 1, (rows, columns // size, 1), generator=generator)
    codes = torch.randint(low, high + 1, (rows, columns // size, size), generator=generator)
    codes = codes.clamp(torch.maximum(-reach, torch.tensor(low)), reach)
    return (codes * scales).reshape(rows, columns)


@pytest.mark.few(4)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_rounded_weight_gives_its_codes_back(grid):
    weight = rounded(sparse_weight(), grid)
    for dtype in DTYPES:
        held = weight.to(dtype)
        codes = codes_of(held, grid)
        assert torch.equal(codes.weight(dtype), held)
        assert codes.codes.min() >= grid.lowest_code
        assert codes.codes.max() <= grid.highest_code


@pytest.mark.few(4)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_codes_and_scales_are_found(grid, dtype):
    for seed in range(3):
        weight = values_on(grid, seed).to(dtype)
        found = codes_of(weight, grid)
        assert torch.equal(found.weight(dtype), weight)
        assert torch.equal(found.codes == 0, weight == 0)
        assert torch.equal(found.scales, found.scales.bfloat16().float())
        assert (found.scales > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, None])
def test_a_negative_scale_is_found_where_a_code_of_8_would_be_needed(size, dtype):
    grid = Grid(4, size)
    generator = torch.Generator().manual_seed(2)
    groups = torch.randint(-7, 8, (16, 256 // (size or 256), size or 256), generator=generator)
    groups[..., 5] = -8
    groups[::2] *= -1
    scales = torch.rand(*groups.shape[:2], 1, generator=generator).add_(0.01).bfloat16().float()
    held = (groups * scales).reshape(16, 256).to(dtype)
    found = codes_of(held, grid)
    assert torch.equal(found.weight(dtype), held)
    assert not torch.signbit(found.weight()[held == 0]).any()
    assert torch.equal(found.scales < 0, (groups[..., 5] == 8))
    assert torch.equal(found.codes.reshape(groups.shape) == -8, groups.abs() == 8)
    assert found.codes.max() <= 7
    assert torch.equal(found.steps().codes.reshape(groups.shape).long(), groups)


def test_a_group_with_8_steps_up_and_down_is_on_no_grid():
    weight = torch.zeros(4, 64)
    weight[2, 3], weight[2, 9], weight[2, 11] = 8, -8, 1
    assert not lies_on(weight, Grid(4, 32))
    weight[2, 9] = -7
    assert lies_on(weight, Grid(4, 32))


@pytest.mark.parametrize("size", [64, 32, None])
def test_the_largest_weight_of_4_bits_has_the_code_of_8_steps_whatever_its_sign(size):
    """So that turning a weight turns what it is rounded to, and errors are those of 16 levels."""
    grid = Grid(4, size)
    weight = sparse_weight()
    found = rounded(weight, grid)
    assert torch.equal(rounded(-weight, grid), -found)
    steps = codes_of(found, grid).steps().codes.reshape(24, -1, grid.columns_per_scale(256))
    assert (steps.amax(-1) == 8).any()
    assert (steps.amin(-1) == -8).any()
    assert not ((steps.amax(-1) == 8) & (steps.amin(-1) == -8)).any()
    old = (weight.reshape(steps.shape).abs().amax(-1) / 7).bfloat16().float()
    fifteen = (weight.reshape(steps.shape) / old.clamp_min(1e-9)[..., None]).round().clamp(-7, 7)
    before = (fifteen * old[..., None]).reshape(weight.shape)
    assert (found - weight).square().sum() < 0.85 * (before - weight).square().sum()


def test_codes_above_128_are_found_in_bfloat16_though_it_lies_beside_them():
    """143 times such a scale is rounded to what is nearer to 142 times it."""
    grid, scale = Grid(8, 32, symmetric=False), 0.00087738037109375
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([-143.0, 112.0, 1.0]) * scale
    held = weight.bfloat16()
    assert int((held[0, 0].float() / scale).round()) == -142
    found = codes_of(held, grid)
    assert torch.equal(found.weight(torch.bfloat16), held)
    assert found.codes[0, :4].tolist() == [-143, 112, 1, 0]


def test_the_scale_of_the_rounding_is_found_again():
    """Of float32: the codes of the rounding, not other ones that give the same values."""
    for grid in (Grid(8, 64), Grid(4, 32)):
        weight = sparse_weight()
        codes = nearest_codes(weight, fitted_scales(weight, grid), grid)
        found = codes_of(codes.weight(), grid)
        groups = codes.codes.reshape(-1, grid.group_size)
        full = groups.abs().amax(1) >= grid.highest_code
        assert full.sum() > len(full) / 2
        assert torch.equal(found.codes.reshape(groups.shape)[full], groups[full])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_keeps_zeros_and_stays_within_half_a_step_where_nothing_is_clipped(grid):
    weight = sparse_weight()
    scales = fitted_scales(weight, grid)
    codes = nearest_codes(weight, scales, grid)
    size = grid.columns_per_scale(256)
    steps = scales.repeat_interleave(size, 1)
    inside = (
        codes.codes > codes.codes.reshape(24, -1, size).amin(-1).repeat_interleave(size, 1)
    ) & (codes.codes < codes.codes.reshape(24, -1, size).amax(-1).repeat_interleave(size, 1))
    assert ((codes.weight() - weight).abs() <= steps * 0.5001)[inside].all()
    assert (codes.weight()[weight == 0] == 0).all()
    plain = nearest_codes(weight, fitted_scales(weight, grid, torch.ones(256)), grid)
    assert torch.equal(plain.codes, codes.codes)


def test_searched_scales_are_no_worse_than_the_widest():
    weight = sparse_weight()
    for grid in (Grid(4, 32), Grid(4), Grid(4, 64, symmetric=False)):
        size = grid.columns_per_scale(256)
        grouped = weight.reshape(24, -1, size)
        step = (
            grouped.abs().amax(-1) / grid.largest_step
            if grid.symmetric
            else (grouped.amax(-1).clamp_min(0) - grouped.amin(-1).clamp_max(0)) / 15
        )
        step = torch.where(step == 0, 1.0, step * 1.01).bfloat16().float()
        widest = nearest_codes(weight, step, grid).weight()
        assert (rounded(weight, grid) - weight).square().sum() <= (widest - weight).square().sum()


def test_a_weight_off_the_grid_is_counted():
    grid = Grid(4, 32)
    weight = rounded(sparse_weight(), grid)
    weight[0, 0] += 0.0123
    weight[5, 40] = 3.7
    with pytest.raises(OffGridError, match=r"64 of 6,144 weights.*int4, groups of 32.*quantize_"):
        codes_of(weight, grid)
    weight[0, 0] = torch.nan
    with pytest.raises(OffGridError):
        codes_of(weight, grid)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bits": 3}, "bits is 3; wanted 8 or 4"),
        ({"bits": True}, "bits is True"),
        ({"bits": 4, "group_size": 48}, "group_size is 48; wanted 128, 64 or 32"),
        ({"bits": 4, "symmetric": 1}, "symmetric is 1"),
    ],
)
def test_what_is_no_grid_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Grid(**values)


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(
        ValueError, match=r"group_size 128 does not divide the 576 inputs.*64 or 32 or None"
    ):
        rounded(torch.ones(2, 576), Grid(8, 128))


@pytest.mark.few(2)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_twice_is_rounding_once(grid):
    """Also where no code of a group is the largest one, which a search for scales would change."""
    for weight in (rounded(sparse_weight(), grid), values_on(grid, 1)):
        assert lies_on(weight, grid)
        assert torch.equal(rounded(weight, grid), weight)
    assert not lies_on(sparse_weight(), grid)
