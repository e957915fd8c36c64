"""ShiRA's rank: the default fits every layer, and another one is refused with what fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse import SparsityConfig
from tests.support.tiny_models import tiny_batches, tiny_model

peft: Any = pytest.importorskip("peft")


def sparse() -> Any:
    model = tiny_model("llama")
    hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5), "magnitude")
    return model


def room(weight: torch.Tensor) -> int:
    return int((weight != 0).sum()) // sum(weight.shape)


def test_the_default_rank_fits_the_smallest_layer() -> None:
    model = sparse()
    most = min(room(p) for name, p in model.named_parameters() if "_proj" in name)
    assert 0 < most < hf_sparse.recover.RECOVERIES["shira"].r  # else nothing is bounded
    report = hf_sparse.recover_(model, tiny_batches("llama"), "shira")
    assert report.options["r"] == most


def test_a_given_rank_is_not_changed() -> None:
    with pytest.raises(ValueError, match=r"r=16 asks ShiRA for .* Wanted r <= \d+ for this layer"):
        hf_sparse.recover_(sparse(), tiny_batches("llama"), "shira", r=16)


def test_the_error_tells_a_rank_that_works() -> None:
    model = sparse()
    with pytest.raises(ValueError, match=r"r=(\d+) fits every layer of the blocks") as refused:
        hf_sparse.get_peft_model(model, peft.ShiraConfig(target_modules=["o_proj", "k_proj"]))
    rank = int(str(refused.value).split(" fits every")[0].rpartition("r=")[2])
    hf_sparse.get_peft_model(model, peft.ShiraConfig(r=rank, target_modules="all-linear"))
