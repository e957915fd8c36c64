"""The targets that this CPU runs, for the tests of kernels."""

from __future__ import annotations

import pytest

from hf_sparse.runtime.llvm import target

TARGETS = list(target.targets())


@pytest.fixture(scope="module", params=TARGETS)
def chosen(request: pytest.FixtureRequest) -> target.Target:
    if TARGETS.index(request.param) < TARGETS.index(target.host().name):
        pytest.skip("this CPU has not the instructions, or another target was asked for")
    return target.named(request.param)
