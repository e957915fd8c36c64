"""The targets that this CPU runs, for the tests of kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_sparse.runtime.llvm import target

TARGETS = list(target.targets())


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Machine code for another target than this CPU's takes seconds to make: its tests are slow."""
    here = Path(__file__).parent
    for item in items:
        given = getattr(item, "callspec", None) if here in item.path.parents else None
        names = (
            [value for value in given.params.values() if isinstance(value, str)] if given else []
        )
        if any(name.split(",")[0] in TARGETS and name != target.host().name for name in names):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", params=TARGETS)
def chosen(request: pytest.FixtureRequest) -> target.Target:
    if TARGETS.index(request.param) < TARGETS.index(target.host().name):
        pytest.skip("this CPU has not the instructions, or another target was asked for")
    return target.named(request.param)
