"""Rates of kernels, for targets that were measured and for others."""

from __future__ import annotations

from dataclasses import replace

import pytest

import hf_sparse
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.weights.rates import NOMINAL, nominal
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("name", target.targets())
def test_a_target_that_was_measured_has_its_own_rates(name: str) -> None:
    chosen = target.targets()[name]
    assert nominal(chosen) is NOMINAL[name]
    assert nominal(replace(chosen, name="new")) is NOMINAL[name]
    assert nominal(replace(chosen, name="wide", lanes=64)) is NOMINAL["avx512"]


@pytest.mark.slow
def test_a_new_row_of_instruction_sets_is_all_that_compile_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not hasattr(target.host, "cache_clear"):
        pytest.skip("a target was asked for")
    row = next(row for row in target.INSTRUCTION_SETS if row.name == target.host().name)
    monkeypatch.setattr(target, "INSTRUCTION_SETS", (replace(row, name="new"),))
    target.targets.cache_clear()
    target.host.cache_clear()
    try:
        compiled = hf_sparse.compile(tiny_model("llama"))
        assert compiled.explain(tokens=8).target == "new"
    finally:
        monkeypatch.undo()
        target.targets.cache_clear()
        target.host.cache_clear()
