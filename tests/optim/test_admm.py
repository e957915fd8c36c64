"""ADMM as a way to a sparsity: its updates against the formulas, and a problem of moving masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sparse import Schedule, SparseAdamW, Sparsifier, SparsityConfig, sparse_param_groups
from hf_sparse.optim.admm import Admm
from tests.support.tiny_models import tiny_model

HALF = SparsityConfig("unstructured", 0.5)


def one_layer(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    return nn.Sequential(layer)


def optimizer_of(model: nn.Module, config: SparsityConfig = HALF, **settings: Any) -> SparseAdamW:
    config = SparsityConfig(config.pattern, config.sparsity, targets="*")
    groups = sparse_param_groups(model, config)
    return SparseAdamW(groups, **{"lr": 0.1, "weight_decay": 0.0, "scale": "lr", **settings})


def keep(weight: Tensor, share: float) -> Tensor:
    """The weight with its smallest values zero."""
    count = round(share * weight.numel())
    out = weight.clone().flatten()
    out[out.abs().argsort()[:count]] = 0
    return out.view_as(weight)


def test_the_updates_are_those_of_the_formulas() -> None:
    torch.manual_seed(0)
    start = torch.randn(4, 8)
    model = one_layer(start)
    optimizer = optimizer_of(model)
    method = Admm(optimizer, rho=3.0)
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.0)
    [weight], [other] = model.parameters(), twin.parameters()
    u = torch.zeros_like(start)
    weight.grad, other.grad = torch.ones(4, 8), torch.ones(4, 8)
    optimizer.step()
    plain.step()
    for share in (0.25, 0.5):
        method.approach(share, 1)
        z = keep(other.detach() + u, share)
        u = u + other.detach() - z
        for _ in range(3):
            gradient = torch.randn(4, 8)
            weight.grad, other.grad = gradient.clone(), gradient.clone()
            optimizer.step()
            plain.step()
            other.data = (other.data + 0.3 * (z - u)) / 1.3
            torch.testing.assert_close(weight, other)
    method.finish(0.5)
    torch.testing.assert_close(weight.detach() != 0, keep(other.detach() + u, 0.5) != 0)
    assert set(optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.slow
def test_masks_move_to_a_lower_loss_than_that_of_the_smallest_weights() -> None:
    """Least squares with inputs of very different sizes: small weights of large inputs must stay."""
    torch.manual_seed(1)
    wanted = torch.randn(6, 16)
    inputs = torch.randn(256, 16) @ torch.randn(16, 16) * torch.logspace(0.7, -0.7, 16)

    def loss_of(weight: Tensor) -> Tensor:
        return (inputs @ (weight - wanted).T).square().mean()

    model = one_layer(wanted)
    optimizer = optimizer_of(model, lr=0.01)
    schedule = Schedule("constant", 0.0, 0.7)
    sparsifier = Sparsifier(
        optimizer,
        SparsityConfig("unstructured", 0.5, targets="*"),
        1000,
        interval=10,
        method="admm",
        schedule=schedule,
        rho=5.0,
    )
    [weight] = model.parameters()
    for _ in range(1000):
        optimizer.zero_grad()
        loss_of(weight).backward()
        optimizer.step()
        sparsifier.step()
    assert float((weight == 0).float().mean()) == 0.5
    smallest = keep(wanted, 0.5)
    mask = (smallest != 0).double()
    gram = (inputs.T @ inputs).double()
    best = torch.stack(  # the smallest weights go, and the others are solved for exactly
        [_solved(gram, row, kept) for row, kept in zip(wanted.double(), mask, strict=True)]
    )
    assert float(loss_of(weight.detach())) < float(loss_of(best.float()))


def _solved(gram: Tensor, row: Tensor, kept: Tensor) -> Tensor:
    chosen = kept.nonzero().flatten()
    out = torch.zeros_like(row)
    out[chosen] = torch.linalg.solve(gram[chosen][:, chosen], gram[chosen] @ row)
    return out


@pytest.mark.few(1)
@pytest.mark.parametrize("pattern", ["2:4", "block:4x1"])
def test_a_run_resumes_from_the_states_of_its_optimizer(pattern: str) -> None:
    config = SparsityConfig(pattern, None if pattern == "2:4" else 0.6)

    def run(model: Any, optimizer: Any, sparsifier: Sparsifier, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
            sparsifier.step()

    def made(model: Any) -> tuple[SparseAdamW, Sparsifier]:
        optimizer = SparseAdamW(sparse_param_groups(model, config), lr=1e-3)
        return optimizer, Sparsifier(optimizer, config, 20, interval=2, method="admm")

    whole = tiny_model("gpt2")
    run(whole, *made(whole), range(20))
    model = tiny_model("gpt2")
    optimizer, sparsifier = made(model)
    run(model, optimizer, sparsifier, range(7))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    again = tiny_model("gpt2")
    again.load_state_dict(weights)
    optimizer = SparseAdamW(sparse_param_groups(again, config), lr=1e-3)
    optimizer.load_state_dict(state)
    sparsifier = Sparsifier(optimizer, config, 20, interval=2, method="admm")
    run(again, optimizer, sparsifier, range(7, 20))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)
    sparsifier.check()


def test_options_out_of_range_are_refused() -> None:
    model = tiny_model("gpt2")
    optimizer = SparseAdamW(sparse_param_groups(model, HALF))
    with pytest.raises(ValueError, match=r"rho is 0\.0; wanted a finite number > 0"):
        Sparsifier(optimizer, HALF, 10, method="admm", rho=0.0)
