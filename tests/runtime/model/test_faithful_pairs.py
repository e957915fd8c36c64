"""Both stacks of an encoder with a decoder compute what the model computes, or compile refuses them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hf_sparse
from hf_sparse.runtime.model.pairs import PAIRS
from tests.runtime.model.test_faithful import change_each_attribute, part_that_does_more
from tests.support.pairs import inputs_of, pair_of

pytestmark = pytest.mark.slow


def block_of(model: nn.Module, family: str, which: int) -> nn.Module:
    """The last block of the encoder, or of the decoder."""
    described = PAIRS[family](model.config)[which]
    return model.base_model.get_submodule(described.stack)[-1]


@pytest.mark.parametrize("which", [0, 1], ids=["encoder", "decoder"])
@pytest.mark.parametrize("family", PAIRS)
def test_an_attribute_of_any_module_is_refused_or_makes_no_difference(
    family: str, which: int
) -> None:
    model, given = pair_of(family), inputs_of(1, 12, 7)

    @torch.no_grad()
    def result(one: nn.Module) -> Tensor:
        return one(**given, use_cache=False)[0]

    assert change_each_attribute(model, block_of(model, family, which), result) > 6
    hf_sparse.compile(model)


@pytest.mark.parametrize("how", ["subclass", "wrapped", "hook", "forward"])
@pytest.mark.parametrize("which", [0, 1], ids=["encoder", "decoder"])
@pytest.mark.parametrize("family", ["bart", "t5", "umt5"])
def test_any_module_that_is_changed_is_refused(family: str, which: int, how: str) -> None:
    model = pair_of(family, sparsity=0.0)
    block = block_of(model, family, which)
    for name in [name for name, _ in block.named_modules() if name]:
        before = block.get_submodule(name)
        block.set_submodule(name, part_that_does_more(model, before, how))
        with pytest.raises(ValueError, match=rf"\.{name} (is|has)"):
            hf_sparse.compile(model)
        block.set_submodule(name, before)
    hf_sparse.compile(model)
