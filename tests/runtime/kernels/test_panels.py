"""Panels of any width hold the same weight, give the same product, and are checked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hf_sparse.runtime.kernels import spmm
from hf_sparse.runtime.kernels.call import run
from hf_sparse.runtime.kernels.weight_types import FLOAT32
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.llvm.jit import Code, compile_kernels
from hf_sparse.runtime.weights import panel_checks, panels
from hf_sparse.runtime.weights.memory import aligned
from hf_sparse.runtime.weights.rates import NOMINAL

ROWS, COLUMNS = 48, 500


@pytest.fixture(scope="module")
def code(chosen: target.Target) -> Code:
    return compile_kernels([spmm.spmm(chosen, 1, 4)], chosen, None)


def weight() -> np.ndarray:
    random = np.random.default_rng(0)
    kept = random.random((ROWS, COLUMNS)) < 0.3
    return np.where(kept, random.standard_normal((ROWS, COLUMNS)), 0).astype(np.float32)


@pytest.mark.few(6)
@pytest.mark.parametrize("columns", [64, 128, 192, 256])
def test_panels_of_any_width_give_the_product(
    code: Code, chosen: target.Target, columns: int
) -> None:
    (packed,) = panels.pack_many([(weight(), 1)], panel_columns=columns)
    panel_checks.check(packed, FLOAT32)
    assert np.array_equal(panels.unpack(packed), weight())
    assert set(packed.panels[: packed.chunks[-1, 0], 0].tolist()) == set(range(0, COLUMNS, columns))
    x = aligned(COLUMNS, chosen.widths[0]).normal_()
    y = aligned(ROWS, chosen.widths[0]).fill_(1.0)
    run(code, packed.operation(0, 4, x.data_ptr(), y.data_ptr(), 0, spmm.START_SUM))
    wanted = 1 + weight().astype(np.float64) @ x.double().numpy()
    np.testing.assert_allclose(y.numpy(), wanted, atol=5e-4)


@pytest.mark.parametrize("begin", [32, 65, -64, 512])
def test_a_panel_that_begins_elsewhere_is_refused(begin: int) -> None:
    (packed,) = panels.pack_many([(weight(), 1)], panel_columns=192)
    moved = packed.panels.copy()
    moved[1, 0] = begin
    with pytest.raises(ValueError, match="none begins at"):
        panel_checks.check(replace(packed, panels=moved), FLOAT32)


def test_an_index_beyond_the_columns_is_refused() -> None:
    (packed,) = panels.pack_many([(weight(), 1)], panel_columns=192)
    moved = packed.panels.copy()
    moved[moved[:, 0] == 192, 0] = 384
    with pytest.raises(ValueError, match="a column is out of range"):
        panel_checks.check(replace(packed, panels=moved), FLOAT32)


def test_every_target_has_panels_that_indices_reach() -> None:
    for rates in NOMINAL.values():
        assert rates.panel_columns % panels.PANEL_UNIT == 0
        assert rates.panel_columns <= 256
