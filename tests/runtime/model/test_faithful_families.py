"""A compiled model of any family computes what the model computes, or compile refuses it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hf_sparse
from hf_sparse.runtime.model.families import COMPILED
from tests.runtime.model.test_faithful import change_each_attribute, check_changed_parts
from tests.support.compiled_families import DECODERS, FAMILIES, inputs_of, model_of

TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}
# What runs in the fast suite: blocks that differ by their place.
FAST = ("modernbert",)
EACH = [
    pytest.param(family, marks=() if family in FAST else pytest.mark.slow) for family in FAMILIES
]


@pytest.mark.slow
@pytest.mark.parametrize("family", EACH)
def test_an_attribute_of_any_module_is_refused_or_makes_no_difference(family: str) -> None:
    model, given = model_of(family), inputs_of(family, 1, 12)
    given |= {"use_cache": False} if family in DECODERS else {}

    @torch.no_grad()
    def result(one: nn.Module) -> Tensor:
        return one(**given)[0]

    block = model.get_submodule(COMPILED[family].stack)[-1]
    assert change_each_attribute(model, block, result) > 6
    hf_sparse.compile(model)


@pytest.mark.parametrize("how", ["subclass", "wrapped", "hook", "forward"])
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_any_module_that_is_changed_is_refused(family: str, how: str) -> None:
    model = model_of(family, sparsity=0.0)
    block = model.get_submodule(COMPILED[family].stack)[-1]
    check_changed_parts(model, block, how)
