"""Tiles times weights of few bits, against exact integers, on all targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_sparse.runtime.kernels import byte_tiles, spmm
from hf_sparse.runtime.kernels.all import kernels
from hf_sparse.runtime.kernels.call import run
from hf_sparse.runtime.kernels.code_formats import FORMATS, CodeFormat
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.llvm.code_cache import DEFAULT_CACHE
from hf_sparse.runtime.llvm.jit import Code
from hf_sparse.runtime.weights.code_part import CodePart
from hf_sparse.runtime.weights.codes import pack_codes
from hf_sparse.runtime.weights.memory import aligned
from tests.support.code_references import product_ref, quantise_ref
from tests.support.coded_weights import random_codes, random_scales
from tests.support.crosses import cross

SIZES = [(4, 1), (13, 70), (36, 129), (116, 256)]


@pytest.fixture(scope="module")
def code(chosen: target.Target) -> Code:
    return kernels(chosen, DEFAULT_CACHE, codes=True)


def random_tile(features: int, width: int) -> torch.Tensor:
    """Features whose sizes differ from block to block, and from token to token."""
    random = torch.Generator().manual_seed(features)
    tile = torch.randn(features, width, generator=random)
    tile *= torch.linspace(0.1, 10, features)[:, None] * torch.linspace(1, 5, width)
    return aligned(features, width).copy_(tile)


def records_of(code: Code, x: torch.Tensor, vectors: int) -> torch.Tensor:
    features, width = x.shape
    records = aligned(byte_tiles.record_features(features), width)
    operation = byte_tiles.QUANTISE_TILE.operation(
        f"quantise_tile{vectors}", x=x.data_ptr(), records=records.data_ptr(), columns=features
    )
    run(code, operation)
    return records


def product(
    code: Code, part: CodePart, x: torch.Tensor, vectors: int, start: int = spmm.START_BIAS
) -> np.ndarray:
    """`x` times all rows of a weight, added to 1 or to a bias of 0.5, as `start` says."""
    records = records_of(code, x, vectors)
    y, bias = aligned(part.rows, x.shape[1]).fill_(1.0), aligned(part.rows + 16).fill_(0.5)
    for chunk in range(len(part.chunk_rows) - 1):
        places = (records.data_ptr(), y.data_ptr(), bias.data_ptr())
        run(code, part.operation(chunk, vectors, *places, start))
    return y.numpy()


@pytest.mark.few(4)
@cross("rows, columns, form, vectors", SIZES, FORMATS, [4, 2, 1])
def test_the_product_is_that_of_exact_integers(
    code: Code, chosen: target.Target, rows: int, columns: int, form: CodeFormat, vectors: int
) -> None:
    codes = random_codes(rows, columns, form)
    scales = random_scales(rows, -(-columns // form.group))
    part = CodePart(pack_codes(codes, scales, form.group, form), 0, columns)
    x = random_tile(columns, vectors * chosen.lanes)
    tokens = x.numpy().T
    wanted = np.stack([product_ref(codes, scales, form.group, token) for token in tokens], axis=1)
    begun = {spmm.START_SUM: 1.0, spmm.START_BIAS: 0.5, spmm.START_SUM_BIAS: 1.5}
    for start, added in begun.items():
        found = product(code, part, x, vectors, start)
        error = np.abs(found - wanted - added).max()
        assert error <= 1e-6 * np.abs(wanted).max() * columns**0.5 + 1e-5


@pytest.mark.few(19)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.suffix)
@pytest.mark.parametrize("sign", [1, -1])
def test_no_sum_overflows_at_the_extremes(
    code: Code, chosen: target.Target, form: CodeFormat, sign: int
) -> None:
    codes = random_codes(8, 192, form, extreme=True, fewer=0.0)
    codes[0] = np.where(codes[0] != 0, codes.min(), 0)  # all of one sign
    scales = np.ones((8, 192 // form.group), np.float32)
    part = CodePart(pack_codes(codes, scales, form.group, form), 0, 192)
    x = aligned(192, 4 * chosen.lanes).fill_(127.0 * sign)
    wanted = 127 * sign * codes.astype(np.int64).sum(axis=1)
    found = product(code, part, x, 4)
    assert np.array_equal(found - 0.5, np.broadcast_to(wanted[:, None], found.shape))


def test_columns_in_the_middle_of_a_weight(code: Code, chosen: target.Target) -> None:
    form = FORMATS[0]
    codes, scales = random_codes(20, 256, form), random_scales(20, 256 // form.group)
    part = CodePart(pack_codes(codes, scales, form.group, form), 128, 70)
    x = random_tile(70, 4 * chosen.lanes)
    inside, own = codes[:, 128:198], scales[:, 128 // form.group :]
    wanted = [
        product_ref(inside, own[:, : -(-70 // form.group)], form.group, token)
        for token in x.numpy().T
    ]
    np.testing.assert_allclose(
        product(code, part, x, 4), np.stack(wanted, axis=1) + 0.5, rtol=1e-4, atol=1e-2
    )


@pytest.mark.parametrize("vectors", [4, 2, 1])
def test_records_hold_the_nearest_codes(code: Code, chosen: target.Target, vectors: int) -> None:
    width = vectors * chosen.lanes
    x = random_tile(100, width)
    x[:, 1], x[3, 0] = 0.0, 1e-40
    records = records_of(code, x, vectors).view(torch.uint8).reshape(2, -1)
    stored = records[:, : 64 * width].numpy().view(np.int8).reshape(2, 16, width, 4)
    numbers = records[:, 64 * width :].contiguous().view(torch.float32).reshape(2, 3, width)
    for token in range(width):
        codes, scales = quantise_ref(x.numpy()[:, token])
        found = stored[:, :, token].reshape(2, 64)
        assert np.abs(found - codes).max() <= 1  # a half may be rounded to either side
        assert np.count_nonzero(found != codes) <= 2
        np.testing.assert_allclose(numbers[:, 0, token], scales, rtol=1e-6)
        sums = numbers[:, 1:, token].contiguous().view(torch.int32).numpy()
        assert np.array_equal(sums, -128 * found.astype(int).reshape(2, 2, 32).sum(axis=2))


def test_a_token_that_is_not_finite_spoils_no_other(code: Code, chosen: target.Target) -> None:
    form = FORMATS[0]
    codes, scales = random_codes(20, 128, form), random_scales(20, 128 // form.group)
    part = CodePart(pack_codes(codes, scales, form.group, form), 0, 128)
    x = random_tile(128, 4 * chosen.lanes)
    wanted = product(code, part, x, 4)
    x[5, 0], x[70, 2] = torch.nan, torch.inf
    found = product(code, part, x, 4)
    assert np.isnan(found[:, [0, 2]]).all()
    others = [token for token in range(x.shape[1]) if token not in (0, 2)]
    assert np.array_equal(found[:, others], wanted[:, others])
