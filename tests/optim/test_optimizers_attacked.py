"""Optimizers and training methods are given what they cannot work with: told before a step is taken."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sparse import SparseAdamW, Sparsifier, SparsityCallback, SparsityConfig, sparse_param_groups
from hf_sparse.optim.methods import TRAINING_METHODS
from tests.support.tiny_models import tiny_model

CONFIG = SparsityConfig("unstructured", 0.5)


def optimizer_of(weight: Tensor, **settings: Any) -> SparseAdamW:
    group = {"params": [nn.Parameter(weight, requires_grad=False)], "pattern": "unstructured"}
    return SparseAdamW([{**group, **settings}], lr=0.1)


@pytest.mark.parametrize(
    ("weight", "wanted"),
    [
        (torch.ones(4, 4, dtype=torch.complex64), "is of torch.complex64"),
        (torch.ones(4, 4, dtype=torch.int32), "is stored as torch.int32"),
        (torch.eye(4).to_sparse(), "is stored as torch.sparse_coo"),
    ],
)
def test_weights_that_cannot_be_shrunk_are_refused(weight: Tensor, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        optimizer_of(weight)


@pytest.mark.parametrize("lam", [-1, math.nan, math.inf, "x", True, 1j])
def test_a_strength_that_cannot_be_is_refused(lam: Any) -> None:
    with pytest.raises(ValueError, match=r"lam is .*; wanted"):
        optimizer_of(torch.ones(4, 4), lam=lam)


@pytest.mark.parametrize("lam", [-3.0, math.nan, "x"])
def test_a_strength_that_a_state_brings_is_refused_before_the_step(lam: Any) -> None:
    weight = torch.randn(4, 4)
    optimizer = optimizer_of(weight.clone(), lam=0.1)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lam"] = lam
    optimizer.load_state_dict(saved)
    [parameter] = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"lam is .*; wanted a finite number >= 0"):
        optimizer.step()
    assert (parameter == weight).all()


def test_a_group_without_strength_takes_the_default() -> None:
    optimizer = optimizer_of(torch.randn(4, 4))
    [parameter] = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones(4, 4)
    optimizer.step()
    assert optimizer.param_groups[0]["lam"] is not None


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_state_of_other_shapes_is_refused_when_it_is_loaded(name: str) -> None:
    optimizer = optimizer_of(torch.randn(4, 4), lam=0.1)
    [parameter] = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones(4, 4)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    saved["state"][0][name] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=rf"{name} was saved for a weight of the shape \(3, 3\)"):
        optimizer.load_state_dict(saved)


def test_a_closure_is_called_once_and_its_loss_given() -> None:
    optimizer = optimizer_of(torch.randn(4, 4), lam=0.1)
    calls = []
    assert optimizer.step(lambda: calls.append(1) or 3.0) == 3.0  # type: ignore[func-returns-value]
    assert calls == [1]


@pytest.mark.parametrize("method", TRAINING_METHODS)
@pytest.mark.parametrize("options", [{"nope": 1}, {"threshhold": 0.1}])
def test_an_option_that_a_training_method_does_not_have_is_told(
    method: str, options: dict[str, Any]
) -> None:
    message = f"method '{method}' has no option"
    with pytest.raises(ValueError, match=message):
        SparsityCallback(CONFIG, method=method, **options)
    optimizer = SparseAdamW(sparse_param_groups(tiny_model("llama"), CONFIG))
    with pytest.raises(ValueError, match=message):
        Sparsifier(optimizer, CONFIG, 10, method=method, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"score_lr": 0},
        {"score_lr": math.nan},
        {"score_lr": "x"},
        {"threshold": 0.5},
        {"threshold": -1},
        {"gain": -2},
        {"gain": math.inf},
    ],
)
def test_an_option_of_movement_out_of_range_is_told_before_training(
    options: dict[str, Any],
) -> None:
    [name] = options
    with pytest.raises(ValueError, match=f"{name} is .*; wanted"):
        SparsityCallback(CONFIG, method="movement", **options)
