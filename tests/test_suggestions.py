"""A name that is not known is answered with the names that are, and the one that was meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import hf_sparse
from hf_sparse import Schedule, SparsityConfig
from hf_sparse.calibration import linalg
from hf_sparse.calibration import losses as training
from hf_sparse.patterns import Pattern
from tests.support.tiny_models import tiny_batches, tiny_model


@pytest.mark.parametrize(
    ("notation", "meant"),
    [
        ("4x1", "'block:4x1'"),
        ("block 16x16", "'block:16x16'"),
        ("block-4x1", "'block:4x1'"),
        ("BLOCK:4X1", "'block:4x1'"),
        ("4*1", "'block:4x1'"),
        ("4 by 1", "'block:4x1'"),
        ("blocks", "'block:4x1'"),
        ("2/4", "'2:4'"),
        ("2-4", "'2:4'"),
        ("2_4", "'2:4'"),
        ("2 of 4", "'2:4'"),
        ("24", "'2:4'"),
        ("416", "'4:16'"),
        (" 2:4", "'2:4'"),
        ((2, 4), "'2:4'"),
        ("nm", "'2:4'"),
        ("N:M", "'2:4'"),
        ("semi-structured", "'2:4'"),
        ("unstructred", "'unstructured'"),
        ("Unstructured", "'unstructured'"),
        ("rows", "'row'"),
        ("neurons", "'column'"),
        ("colum", "'column'"),
        ("heads", "'head'"),
        ("head64", "'head:64'"),
        ("head-in 64", "'head_in:64'"),
        ("structured", "'column' (whole neurons) or 'head'"),
        ("50%", 'SparsityConfig("unstructured", sparsity=0.5)'),
        ("0.8", 'SparsityConfig("unstructured", sparsity=0.8)'),
        (0.8, 'SparsityConfig("unstructured", sparsity=0.8)'),
    ],
)
def test_patterns(notation: Any, meant: str) -> None:
    with pytest.raises(ValueError, match=r"Known patterns|Wanted a string") as raised:
        Pattern.parse(notation)
    assert str(raised.value).endswith(f" Did you mean {meant}?")


@pytest.mark.parametrize("notation", ["foo", "", "1:99999", "50", "x" * 500, None, "4:2", "0x1"])
def test_patterns_that_nothing_is_like(notation: Any) -> None:
    with pytest.raises(ValueError, match="pattern") as raised:
        Pattern.parse(notation)
    assert "Did you mean" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("sparsity", "end"),
    [
        (80, "Did you mean 0.8?"),
        (50.0, "Did you mean 0.5?"),
        ("80%", "Did you mean 0.8?"),
        ("80 %", "Did you mean 0.8?"),
        ("0.8", "Did you mean 0.8?"),
        ("80", "Did you mean 0.8?"),
        (1, "1 would leave no weight."),
        (1.0, "1 would leave no weight."),
        (100, "wanted a fraction of zeros in [0, 1)."),
        (-0.5, "sparsity is -0.5; wanted a fraction of zeros in [0, 1)."),
        (float("nan"), "sparsity is nan; wanted a fraction of zeros in [0, 1)."),
        (float("inf"), "sparsity is inf; wanted a fraction of zeros in [0, 1)."),
        (True, "sparsity is True; wanted a number in [0, 1)."),
        ([0.5], "sparsity is [0.5]; wanted a number in [0, 1)."),
        ("nan", "sparsity is 'nan'; wanted a number in [0, 1)."),
        (torch.tensor(0.5), "wanted a number in [0, 1)."),
    ],
)
def test_sparsities(sparsity: Any, end: str) -> None:
    with pytest.raises(ValueError, match="sparsity is") as raised:
        SparsityConfig("unstructured", sparsity)
    assert str(raised.value).endswith(end)


def test_numbers_of_numpy_are_numbers() -> None:
    assert SparsityConfig(sparsity=np.float32(0.5)) == SparsityConfig(sparsity=0.5)
    assert type(SparsityConfig(sparsity=np.float32(0.5)).sparsity) is float


def prune(**options: Any) -> Any:
    settings = {"method": "wanda", "batches": tiny_batches("llama"), **options}
    return hf_sparse.prune_(tiny_model("llama"), SparsityConfig("unstructured", 0.5), **settings)


CONFIG = SparsityConfig("unstructured", 0.5)
NAMES: list[tuple[Callable[[], Any], str]] = [
    (lambda: prune(method="wnda"), "Did you mean 'wanda'?"),
    (lambda: prune(method="SparseGPT"), "Did you mean 'sparsegpt'?"),
    (lambda: prune(method="sparsegpt", dampening=0.1), "Did you mean 'damping'?"),
    (lambda: prune(allocation="unifrom"), "Did you mean 'uniform'?"),
    (lambda: prune(refine="swap"), "Did you mean 'swaps'?"),
    (lambda: prune(reconstruction=1), "Did you mean 'reconstruct'?"),
    (lambda: SparsityConfig("2:4", format="bit_mask"), "Did you mean 'bitmask'?"),
    (lambda: SparsityConfig.from_dict({"patern": "2:4"}), "Did you mean 'pattern'?"),
    (lambda: Schedule("cubik"), "Did you mean 'cubic'?"),
    (lambda: hf_sparse.SparsityCallback(CONFIG, method="magntude"), "Did you mean 'magnitude'?"),
    (lambda: hf_sparse.trainer_optimizer(CONFIG, lr=1.0, penalty="L0"), "Did you mean 'l0'?"),
    (
        lambda: hf_sparse.SparseAdamW([torch.nn.Parameter(torch.ones(2, 2))], scale="adaptiv"),
        "Did you mean 'adaptive'?",
    ),
    (
        lambda: hf_sparse.add_shrinkage_(
            torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], lr=1.0), penality="l1"
        ),
        "Did you mean 'penalty'?",
    ),
    (
        lambda: hf_sparse.recover_(tiny_model("llama"), [], "finetuning"),
        "Did you mean 'finetune'?",
    ),
]


@pytest.mark.parametrize(("call", "end"), NAMES, ids=[end[14:-2] for _, end in NAMES])
def test_names(call: Callable[[], Any], end: str) -> None:
    with pytest.raises(ValueError, match=r"[Kk]nown|wanted|options") as raised:
        call()
    assert str(raised.value).endswith(end)


def test_without_onednn_blocks_are_trained_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    assert linalg.onednn("_linear_pointwise") is None
    assert not training.is_bfloat16_faster(torch.ones(2, 2))
    assert prune(reconstruct=1).sparsity == 0.5
    monkeypatch.setattr(torch._C, "_has_mkldnn", True)
    assert linalg.onednn("no_such_operation") is None
