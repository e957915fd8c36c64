"""Weights of 8 and 4 bits: kernels against exact integers, on all targets, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise as neighbours

import numpy as np
import pytest
import torch

from hf_sparse.quantization import Grid
from hf_sparse.runtime.kernels import spmm
from hf_sparse.runtime.kernels.all import kernels
from hf_sparse.runtime.kernels.call import run
from hf_sparse.runtime.kernels.code_formats import BESIDE, BLOCK, FORMATS, RECORD, CodeFormat
from hf_sparse.runtime.kernels.code_rows import QUANTISE_ROW
from hf_sparse.runtime.kernels.weight_types import FLOAT32
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.llvm.jit import Code
from hf_sparse.runtime.weights.code_checks import check_codes
from hf_sparse.runtime.weights.code_part import CodePart
from hf_sparse.runtime.weights.codes import (
    CodeWeight,
    find_patterns,
    format_for,
    pack_codes,
)
from hf_sparse.runtime.weights.memory import Shelf, aligned
from hf_sparse.runtime.weights.rates import NOMINAL
from hf_sparse.runtime.weights.rounding import nearest, pack_nearest
from tests.support.code_references import (
    dequantised,
    product_ref,
    quantise_ref,
    unpack_codes,
)
from tests.support.coded_weights import random_codes, random_scales
from tests.support.crosses import cross
from tests.support.peak_memory import extra

# Rows, columns: tiny, odd, no whole groups and blocks, real.
SIZES = [(4, 1), (13, 70), (70, 24), (36, 129), (516, 256), (192, 576)]
NAMES = list(target.targets())


@pytest.fixture
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Code]:
    def code(name: str) -> Code:
        if NAMES.index(name) < NAMES.index(target.host().name):
            pytest.skip(f"this CPU cannot run {name}")
        folder = tmp_path_factory.getbasetemp().parent / "kernels"
        return kernels(target.named(name), folder, FLOAT32, codes=True)

    return code


def records_of(code: Code, x: torch.Tensor) -> torch.Tensor:
    """Features, in whole blocks, in eight bits."""
    blocks = len(x) // BLOCK
    records = aligned(blocks, RECORD // 4)
    run(
        code,
        QUANTISE_ROW.operation(
            "quantise_row", x=x.data_ptr(), records=records.data_ptr(), blocks=blocks
        ),
    )
    return records


def features(columns: int, extreme: bool = False) -> torch.Tensor:
    """Random features with zeros up to a whole block, or all of one size."""
    x = aligned(-(-columns // BLOCK) * BLOCK)
    x[:columns] = torch.randn(columns)
    return x.sign_().mul_(3) if extreme else x


@pytest.mark.parametrize("name", NAMES)
def test_features_are_rounded_as_numpy_rounds_them(name: str, compiled) -> None:
    code, x = compiled(name), features(300)
    x[64:128] = 0  # a block without a scale
    x[128:192] *= 1e-40  # whose inverse is infinite
    x[192:256] = torch.tensor([1.5, -127.0]).repeat(32)  # halves
    found = records_of(code, x).numpy().view(np.int8)
    codes, scales = quantise_ref(x.numpy())
    ordinary = [0, 1, 3, 4]
    assert np.array_equal(found[ordinary, :BLOCK], codes[ordinary])
    assert np.array_equal(found[:, 128:132].copy().view(np.float32)[:, 0], scales)
    sums = found[:, 132:140].copy().view(np.int32)
    assert np.array_equal(sums, found[:, :BLOCK].astype(int).reshape(-1, 2, 32).sum(axis=2))
    assert np.abs(found[:, :BLOCK].astype(int)).max() <= 127
    beside = found[:, BESIDE : BESIDE + BLOCK].view(np.uint8).astype(int)
    known = (np.abs(found[:, :BLOCK].astype(int)), found[:, :BLOCK].astype(int) + 128)
    assert any(np.array_equal(beside, one) for one in known)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_its_products_nan(name: str, strange: float, compiled) -> None:
    code, x = compiled(name), features(128)
    x[70] = strange
    form = FORMATS[0]
    packed = pack_codes(random_codes(16, 128, form), random_scales(16, 4), 32, form)
    records, y = records_of(code, x), aligned(16)
    run(code, packed.operation(records.data_ptr(), y.data_ptr(), 0, 0, 16, add=False))
    assert y.isnan().all()


@cross("rows, columns, form, extreme, name", SIZES, FORMATS, [False, True], NAMES)
def test_one_token(
    rows: int, columns: int, form: CodeFormat, extreme: bool, name: str, compiled
) -> None:
    code = compiled(name)
    codes, scales = (
        random_codes(rows, columns, form, extreme),
        random_scales(rows, -(-columns // form.group)),
    )
    packed = pack_codes(codes, scales, form.group, form)
    x = features(columns, extreme)
    records = records_of(code, x)
    bias, before = torch.randn(2, -(-rows // 4) * 4)
    product = product_ref(codes, scales, form.group, x[:columns].numpy())
    limit = 2e-6 * float(np.abs(product).max() + 1)
    half = rows // 32 * 16
    for edges in ((0, rows), (0, half, rows)):  # also as two threads do
        for add in (False, True):
            y = before.clone()
            for first, last in neighbours(edges):
                ends = records.data_ptr(), y.data_ptr(), bias.data_ptr()
                run(code, packed.operation(*ends, first, last, add=add))
            wanted = product + bias[:rows].numpy() + (before[:rows].numpy() if add else 0)
            np.testing.assert_allclose(y[:rows].numpy(), wanted, atol=limit)
    y = before.clone()
    run(code, packed.operation(records.data_ptr(), y.data_ptr(), 0, 0, rows, add=False))
    np.testing.assert_allclose(y[:rows].numpy(), product, atol=limit)
    assert not y[rows:].any()  # what the next weight reads behind the last feature


@cross("rows, columns, form, vectors, name", SIZES, FORMATS, [1, 2, 4], NAMES)
def test_tiles(
    rows: int, columns: int, form: CodeFormat, vectors: int, name: str, compiled
) -> None:
    code, width = compiled(name), target.targets()[name].lanes * vectors
    codes, scales = (
        random_codes(rows, columns, form),
        random_scales(rows, -(-columns // form.group)),
    )
    packed = pack_codes(codes, scales, form.group, form)
    weight = dequantised(codes, scales, form.group).astype(np.float64)
    x, before = aligned(columns, width).normal_(), aligned(rows, width).normal_()
    bias = aligned(-(-rows // 4) * 4).normal_()
    for start in (spmm.START_SUM, spmm.START_BIAS, spmm.START_SUM_BIAS):
        y = aligned(rows, width).copy_(before)
        part = CodePart(packed, 0, columns)
        for chunk in range(len(part.chunk_rows) - 1):
            ends = x.data_ptr(), y.data_ptr(), bias.data_ptr()
            run(code, part.operation(chunk, vectors, *ends, start))
        wanted = weight @ x.double().numpy()
        wanted += 0 if start == spmm.START_BIAS else before.double().numpy()
        wanted += 0 if start == spmm.START_SUM else bias[:rows, None].double().numpy()
        np.testing.assert_allclose(y.numpy(), wanted, atol=1e-5 * float(np.abs(wanted).max() + 1))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.suffix)
def test_packed_codes_are_the_codes(form: CodeFormat) -> None:
    codes = random_codes(21, 150, form)
    scales = random_scales(21, -(-150 // form.group))
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
        "not positive",
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
    "a scale of 0": (lambda: spoiled("scales", (0, 0, 0, 0), 0), "not positive"),
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
