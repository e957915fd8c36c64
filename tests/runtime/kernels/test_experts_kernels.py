"""Routing of tokens to experts, moving them there and back, and lists that run only if needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_sparse.runtime.kernels import addition, experts
from hf_sparse.runtime.kernels.call import Slot, run
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.llvm.jit import Code, compile_kernels
from hf_sparse.runtime.programs.nested import Nested
from hf_sparse.runtime.weights.memory import aligned
from tests.support.kernel_references import route_ref


@pytest.fixture(scope="module")
def code(chosen: target.Target) -> Code:
    functions = [*experts.functions(chosen), addition.add(chosen)]
    return compile_kernels(functions, chosen, None)


def routed(
    code: Code, logits: torch.Tensor, tokens: int, most: int, *, normalised: bool
) -> tuple[torch.Tensor, np.ndarray]:
    weights, counts = torch.full_like(logits, 9.0), np.full(len(logits), 9)
    operation = experts.ROUTE.operation(
        "route",
        logits=logits.data_ptr(),
        weights=weights.data_ptr(),
        counts=counts.ctypes.data,
        experts=len(logits),
        tokens=tokens,
        row_bytes=4 * logits.shape[1],
        chosen=most,
        normalised=int(normalised),
    )
    run(code, operation)
    return weights, counts


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    ("count", "width", "tokens", "most"),
    [(1, 1, 1, 1), (8, 16, 11, 2), (40, 8, 8, 8), (5, 4, 4, 5)],
)
def test_route(
    code: Code, count: int, width: int, tokens: int, most: int, normalised: bool
) -> None:
    logits = 3 * torch.randn(count, width, generator=torch.Generator().manual_seed(count))
    weights, counts = routed(code, logits, tokens, most, normalised=normalised)
    wanted = route_ref(logits[:, :tokens].numpy(), most, normalised=normalised)
    np.testing.assert_allclose(weights[:, :tokens].numpy(), wanted, rtol=1e-5, atol=1e-8)
    assert (weights[:, tokens:] == 9).all()
    assert counts.sum() == most * tokens
    assert counts.tolist() == (wanted != 0).sum(axis=1).tolist()
    if normalised:
        torch.testing.assert_close(weights[:, :tokens].sum(0), torch.ones(tokens))


def test_equal_logits_choose_the_first_and_damaged_ones_stay_inside(code: Code) -> None:
    weights, counts = routed(code, torch.zeros(6, 1), 1, 2, normalised=True)
    assert counts.tolist() == [1, 1, 0, 0, 0, 0]
    assert weights[:, 0].tolist() == [0.5, 0.5, 0, 0, 0, 0]
    _, counts = routed(code, torch.full((6, 1), float("nan")), 1, 2, normalised=True)
    assert ((counts >= 0) & (counts <= 1)).all()


def test_gather_and_scatter_give_each_token_back_to_its_place(code: Code) -> None:
    x, packed = torch.randn(7, 16), torch.zeros(7, 8)
    weights = torch.zeros(16)
    weights[[2, 5, 11, 15]] = torch.tensor([0.5, 2.0, -1.0, 3.0])  # the last is beyond the tokens
    shared = {"weights": weights.data_ptr(), "features": 7, "tokens": 12}
    rows = {"x_row_bytes": 64, "y_row_bytes": 32}
    places = {"x": x.data_ptr(), "y": packed.data_ptr()}
    run(code, experts.MOVE.operation("gather", **places, **rows, **shared))
    assert torch.equal(packed[:, :3], x[:, [2, 5, 11]])
    assert not packed[:, 3:].any()
    goal = torch.ones(7, 16)
    rows = {"x_row_bytes": 32, "y_row_bytes": 64}
    places = {"x": packed.data_ptr(), "y": goal.data_ptr()}
    run(code, experts.MOVE.operation("scatter", **places, **rows, **shared))
    torch.testing.assert_close(goal, 1 + x * weights * (torch.arange(16) < 12))


def test_weigh(code: Code, chosen: target.Target) -> None:
    x, weight = aligned(2 * chosen.lanes).fill_(3), torch.tensor([0.5])
    operation = experts.WEIGH.operation(
        "weigh", x=x.data_ptr(), weight=weight.data_ptr(), vectors=1
    )
    run(code, operation)
    assert x.tolist() == [1.5] * chosen.lanes + [3] * chosen.lanes


def test_a_list_runs_if_the_count_is_in_its_range(code: Code, chosen: target.Target) -> None:
    x, y = aligned(chosen.lanes).fill_(1), aligned(chosen.lanes)
    nested = Nested(code)
    places = {"x": x.data_ptr(), "y": y.data_ptr()}
    add = addition.SIGNATURE.operation("add", vectors=1, **places)
    there = nested.place([add, add])
    for count in (0, 1, 4, 5):
        told = np.array([count])
        operation = experts.WHEN.operation(
            "when", count=told.ctypes.data, above=0, most=4, operations=there, number=2
        )
        run(code, operation)
    assert y.tolist() == [4.0] * chosen.lanes
    assert nested.nbytes == nested.memory[0].nbytes
    open_slot = addition.SIGNATURE.operation("add", x=Slot("x"), y=y.data_ptr(), vectors=1)
    with pytest.raises(TypeError, match="add has slots"):
        nested.place([open_slot])
