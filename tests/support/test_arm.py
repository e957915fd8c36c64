"""Kernels for ARM under qemu: right ones run, and those that go too far are told from them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from hf_sparse.runtime.kernels import addition
from hf_sparse.runtime.kernels.call import run
from hf_sparse.runtime.llvm.jit import object_code
from hf_sparse.runtime.weights.memory import aligned
from tests.support import arm
from tests.support.arm import EmulatedCode

pytestmark = pytest.mark.skipif(
    bool(arm.missing()), reason=f"{' and '.join(arm.missing())} are missing: `make test-arm`"
)


@pytest.fixture(scope="module")
def code() -> Any:
    chosen = arm.arm_target()
    functions = [addition.add(chosen)]
    return EmulatedCode(chosen, object_code(functions, chosen), functions)


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(arm, "failures", [])
    monkeypatch.setattr(EmulatedCode, "_twin", None)
    return arm.failures


def test_a_kernel_runs_on_arm(code: Any, failures: list[str]) -> None:
    x, y = aligned(8).fill_(2.5), aligned(8).fill_(1.0)
    run(code, addition.SIGNATURE.operation("add", x=x.data_ptr(), y=y.data_ptr(), vectors=2))
    assert not failures
    assert (y == 3.5).all()
    assert (x == 2.5).all()


@pytest.mark.parametrize(
    ("vectors", "message"), [(3, r"byte 3\d of the 32 at .* was written"), (4096, "signal 11")]
)
def test_a_kernel_that_goes_too_far_is_found(
    code: Any, failures: list[str], vectors: int, message: str
) -> None:
    x, y = aligned(8), aligned(8)
    for count in (vectors, 2):
        run(
            code, addition.SIGNATURE.operation("add", x=x.data_ptr(), y=y.data_ptr(), vectors=count)
        )
    (found,) = failures  # of the first; the second runs again
    assert re.search(message, found)


def test_memory_that_nobody_holds_is_named(code: Any, failures: list[str]) -> None:
    x = aligned(8)
    run(code, addition.SIGNATURE.operation("add", x=x.data_ptr(), y=64, vectors=2))
    assert failures == ["add: no array in sight has the memory at y of add"]


def test_floats_are_compared_by_bits_or_by_a_tolerance() -> None:
    wanted = np.array([1, np.nan, -2, np.inf], np.float32)
    arm._compare_floats(wanted, wanted.copy(), 0.0)
    other = wanted.copy()
    other[0] = np.nextafter(other[0], np.float32(2))
    arm._compare_floats(wanted, other, 1e-5)
    with pytest.raises(ValueError, match=r"1 of 4 floats differ.*number 0"):
        arm._compare_floats(wanted, other, 0.0)
    other[1] = 0
    with pytest.raises(ValueError, match=r"1 of 4 floats differ.*number 1"):
        arm._compare_floats(wanted, other, 1e-5)
