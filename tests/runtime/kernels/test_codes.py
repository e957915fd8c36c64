"""Weights of 8 and 4 bits: kernels against exact integers, on all targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_sparse.runtime.kernels.all import kernels
from hf_sparse.runtime.kernels.call import run
from hf_sparse.runtime.kernels.code_formats import BESIDE, BLOCK, FORMATS, RECORD, CodeFormat
from hf_sparse.runtime.kernels.code_rows import QUANTISE_ROW
from hf_sparse.runtime.kernels.weight_types import FLOAT32
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.llvm.code_cache import DEFAULT_CACHE
from hf_sparse.runtime.llvm.jit import Code
from hf_sparse.runtime.weights.codes import (
    pack_codes,
)
from hf_sparse.runtime.weights.memory import aligned
from tests.support.code_references import (
    product_ref,
    quantise_ref,
)
from tests.support.coded_weights import random_codes, random_scales
from tests.support.crosses import cross
from tests.support.single_tokens import check_rows

# Rows, columns: tiny, odd, no whole groups and blocks, real.
SIZES = [(4, 1), (13, 70), (70, 24), (36, 129), (516, 256), (192, 576)]
NAMES = list(target.targets())
# Beside those of this CPU with its extras, targets without any.
PLAIN = [
    f"{row.name}, plain" for row in target.INSTRUCTION_SETS if row.extras and row.name in NAMES
]
NAMES += PLAIN


@pytest.fixture
def compiled() -> Callable[[str], Code]:
    def code(name: str) -> Code:
        own = name.removesuffix(", plain")
        if NAMES.index(own) < NAMES.index(target.host().name):
            pytest.skip(f"this CPU cannot run {name}")
        chosen = target.named(own)
        if name in PLAIN:
            if chosen.triple:
                pytest.skip("the target of another machine is the plain one already")
            (row,) = (one for one in target.INSTRUCTION_SETS if one.name == own)
            chosen = replace(target.elsewhere(row), triple="")
        return kernels(chosen, DEFAULT_CACHE, FLOAT32, codes=True)

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


@pytest.mark.slow
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
        random_scales(rows, -(-columns // form.group), signs=form.bits == 4),
    )
    packed = pack_codes(codes, scales, form.group, form)
    x = features(columns, extreme)
    records = records_of(code, x)
    product = product_ref(codes, scales, form.group, x[:columns].numpy())
    limit = 2e-6 * float(np.abs(product).max() + 1)
    check_rows(code, packed, records.data_ptr(), product, [rows // 32 * 16], limit)
