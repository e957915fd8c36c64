"""Packing codes of few bits: what is stored, which pattern is chosen, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_sparse.quantization import Grid
from hf_sparse.runtime.kernels.code_formats import FORMATS, CodeFormat
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.weights.code_checks import check_codes
from hf_sparse.runtime.weights.codes import (
    CodeWeight,
    find_patterns,
    format_for,
    pack_codes,
)
from hf_sparse.runtime.weights.memory import Shelf
from hf_sparse.runtime.weights.rates import NOMINAL
from hf_sparse.runtime.weights.rounding import nearest, pack_nearest
from tests.support.code_references import (
    dequantised,
    unpack_codes,
)
from tests.support.coded_weights import random_codes, random_scales
from tests.support.peak_memory import extra

NAMES = list(target.targets())


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.suffix)
def test_packed_codes_are_the_codes(form: CodeFormat) -> None:
    codes = random_codes(21, 150, form)
    scales = random_scales(21, -(-150 // form.group), signs=form.bits == 4)
    packed = pack_codes(codes, scales, form.group, form, Shelf())
    check_codes(packed)
    found, own = unpack_codes(packed)
    assert np.array_equal(found, codes)
    assert np.array_equal(own, np.repeat(scales, form.group, axis=1)[:, :150])
    whole = 32 * 192  # whole groups and blocks
    density = np.count_nonzero(codes) / whole
    extra_bytes = 64 + 8 * 2 * 3 if form.is_masked else 0
    assert packed.nbytes == pytest.approx(form.bytes_for(density) * whole + extra_bytes)


@pytest.mark.parametrize("size", [32, 64, 128, 200])
def test_groups_of_any_size_are_packed(size: int) -> None:
    codes = random_codes(16, 200, FORMATS[0])
    scales = random_scales(16, -(-200 // size))
    form = format_for(8, (4, 4), 200 if size == 200 else size)
    assert form.group == min(size, 64)
    _, own = unpack_codes(pack_codes(codes, scales, size, form))
    assert np.array_equal(own, np.repeat(scales, size, axis=1)[:, :200])


def test_patterns_are_found() -> None:
    for form in FORMATS:
        codes = random_codes(40, 200, form, fewer=0)
        assert (form.kept, form.window) in find_patterns(codes, form.bits)
        if not form.in_order:
            codes[39, : form.window] = 1
            assert (form.kept, form.window) not in find_patterns(codes, form.bits)
    assert find_patterns(random_codes(8, 64, FORMATS[2], fewer=0), 8) == [
        (4, 4),
        (2, 4),
        (8, 16),
        (0, 1),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_zeros_are_used_where_they_pay(name: str) -> None:
    rates = NOMINAL[name].rows
    for form in FORMATS:
        grid = Grid(form.bits, form.group)
        weight = torch.from_numpy(random_codes(64, 256, form, fewer=0)).float()
        packed = pack_nearest(nearest(weight, grid), grid, rates, Shelf())
        assert packed is not None
        assert packed.form.bits == form.bits
        assert packed.form.bytes_for(0.5) <= FORMATS[0].bytes_for(0.5)
        # A mask takes fewer bytes than the places of 8 of 16, where it can be expanded as fast.
        if name == "avx512" and form.window == 16 and form.kept == 8:
            assert packed.form.is_masked
        elif name == "avx512" or (name == "avx2" and not form.is_masked):
            assert packed.form == form


def test_rounding_keeps_zeros_and_any_number_of_columns() -> None:
    weight = torch.randn(30, 100)
    weight[weight.abs() < 0.5] = 0
    for grid in (Grid(8, 64), Grid(4, 32), Grid(8), Grid(4, 32, symmetric=False)):
        codes = nearest(weight, grid)
        found = dequantised(codes.codes.numpy(), codes.scales.numpy(), grid.group_size or 100)
        assert not found[weight.numpy() == 0].any()
        own = np.repeat(codes.scales.numpy(), grid.group_size or 100, axis=1)[:, :100]
        missed = np.abs(found - weight.numpy())
        most = weight.abs().max().item()
        assert (missed <= np.maximum(own * 0.51, 0.35 * most)).all()
        packed = pack_nearest(codes, grid, NOMINAL["avx2"].rows, Shelf())
        assert packed is not None
        assert packed.form.bits == (4 if grid.bits == 4 and grid.symmetric else 8)
    wide = torch.rand(16, 64) + 0.5  # with a zero point for 8 bits, codes up to 255
    grid = Grid(8, 64, symmetric=False)
    assert pack_nearest(nearest(wide, grid), grid, NOMINAL["avx2"].rows, Shelf()) is None


FORM = FORMATS[2]
REFUSED: dict[str, tuple[Callable[[], CodeWeight], str]] = {
    "a code of -128": (
        lambda: pack_codes(np.full((4, 64), -128, np.int8), random_scales(4, 1), 64, FORMATS[1]),
        "codes are from -128",
    ),
    "a code of 8 in 4 bits": (
        lambda: pack_codes(np.full((4, 64), 8, np.int8), random_scales(4, 1), 64, FORMATS[11]),
        "wanted -8 to 7",
    ),
    "too few scales": (
        lambda: pack_codes(random_codes(4, 65, FORMATS[1]), random_scales(4, 1), 64, FORMATS[1]),
        "scales are float32 of shape",
    ),
    "a scale of 0": (
        lambda: pack_codes(
            random_codes(4, 64, FORMATS[1]), np.zeros((4, 1), np.float32), 64, FORMATS[1]
        ),
        "scales are zero",
    ),
    "a negative scale of 8 bits": (
        lambda: pack_codes(random_codes(4, 64, FORMATS[1]), -random_scales(4, 1), 64, FORMATS[1]),
        "8 bits are negative",
    ),
    "a scale that is no bfloat16": (
        lambda: pack_codes(
            random_codes(4, 64, FORMATS[1]), np.full((4, 1), 0.1, np.float32), 64, FORMATS[1]
        ),
        "no bfloat16",
    ),
    "groups that do not fit": (
        lambda: pack_codes(random_codes(4, 96, FORMATS[1]), random_scales(4, 3), 32, FORMATS[1]),
        "scales are for 32 columns",
    ),
    "codes of another pattern": (
        lambda: pack_codes(random_codes(4, 64, FORMATS[1]), random_scales(4, 2), 32, FORM),
        "more than 2 of 4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_packed_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


def changed(**fields: object) -> CodeWeight:
    codes = random_codes(20, 70, FORM, fewer=0)
    return replace(pack_codes(codes, random_scales(20, 3), 32, FORM), **fields)  # type: ignore[arg-type]


def spoiled(stream: str, place: tuple, value: int) -> CodeWeight:
    array = getattr(changed(), stream).copy()
    array[place] = value
    return changed(**{stream: array})


def masked(**fields: object) -> CodeWeight:
    form = CodeFormat(8, 0, 1, 32)
    packed = pack_codes(random_codes(20, 70, form), random_scales(20, 3), 32, form)
    return replace(packed, **fields)  # type: ignore[arg-type]


def other_masks(place: tuple, value: int) -> CodeWeight:
    places = masked().places.copy()
    places[place] = value
    counts = np.bitwise_count(places).sum(axis=-1, dtype=np.int64)
    starts = np.cumsum(counts).reshape(counts.shape) - counts
    codes = np.ones(int(counts.sum()) + 64, np.uint8)
    return masked(places=places, starts=starts, codes=codes)


DAMAGE: dict[str, tuple[Callable[[], CodeWeight], str]] = {
    "codes of another type": (
        lambda: changed(codes=changed().codes.view(np.int8)),
        "codes are int8",
    ),
    "codes cut off": (lambda: changed(codes=changed().codes[:1]), "codes have the shape"),
    "places cut off": (lambda: changed(places=changed().places[:, :, :64]), "places have the"),
    "scales of another type": (
        lambda: changed(scales=changed().scales.astype(np.float32)),
        "scales are float32",
    ),
    "too many rows": (lambda: changed(rows=40), "codes have the shape"),
    "too many columns": (lambda: changed(columns=200), "codes have the shape"),
    "no rows": (lambda: changed(rows=0), "0 rows"),
    "an unknown format": (lambda: changed(form=CodeFormat(8, 3, 4, 64)), "none of the formats"),
    "another group": (lambda: changed(form=replace(FORM, group=64)), "scales have the shape"),
    "a code of -128": (lambda: spoiled("codes", (0, 0, 3), 128), "-128"),
    "a column beyond": (lambda: spoiled("codes", (0, -1, -1), 5), "no column"),
    "a row beyond": (lambda: spoiled("codes", (-1, 0, 63), 5), "no row"),
    "a scale of 0": (lambda: spoiled("scales", (0, 0, 0, 0), 0), "scales are zero"),
    "a negative scale of 8 bits": (
        lambda: spoiled("scales", (0, 0, 0, 0), 0xBF80),
        "negative in 8 bits",
    ),
    "an infinite scale": (lambda: spoiled("scales", (0, 0, 1, 3), 0x7F80), "not finite"),
    "a scale of no row": (lambda: spoiled("scales", (-1, 0, 0, 15), 1), "scales"),
    "one column twice": (lambda: spoiled("places", (0, 0, slice(None)), 0), "mixed up"),
    "masks with codes cut off": (lambda: masked(codes=masked().codes[:-1]), "codes are cut off"),
    "masks with other starts": (
        lambda: masked(starts=masked().starts + 1),
        "do not match the masks",
    ),
    "masks without starts": (
        lambda: masked(starts=np.zeros((0, 0), np.int64)),
        "starts have the shape",
    ),
    "masks with codes in blocks": (
        lambda: masked(codes=masked().codes[None]),
        "codes have the shape",
    ),
    "masks with a code of -128": (
        lambda: masked(codes=np.full_like(masked().codes, 128)),
        "-128",
    ),
    "masks of no column": (lambda: other_masks((0, -1, -1), 255), "no column"),
    "masks of no row": (lambda: other_masks((-1, 0, 7), 255), "no row"),
    "starts of no masks": (lambda: changed(starts=np.zeros((2, 2), np.int64)), "starts have the"),
    "strided": (
        lambda: changed(codes=np.repeat(changed().codes, 2, axis=2)[:, :, ::2]),
        "codes are \\(",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(name: str) -> None:
    make, message = DAMAGE[name]
    with pytest.raises(ValueError, match=message):
        check_codes(make())


def test_packing_needs_little_memory() -> None:
    codes, scales = random_codes(4096, 3072, FORM), random_scales(4096, 96)
    kept: list[CodeWeight] = []
    most = extra(lambda: kept.append(pack_codes(codes, scales, 32, FORM)))
    assert most < kept[0].nbytes / 1e6 + 30
