"""ALPS, iteration by iteration: against the paper's ADMM in float64, and how its iterations end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_sparse.patterns import Pattern
from hf_sparse.pruning import alps
from tests.pruning.test_solvers import PATTERNS, problem

# Iterations between two changes of rho, as the module tells.
EVERY = 3


def inputs_of_admm(pattern: str, sparsity: float) -> tuple:
    given = problem(pattern, sparsity, columns=32, rows=(16,))
    gram, scale = given.scaled_gram(0.01)
    return given, given.joined * scale, gram


def reference_admm(
    weights: Tensor, gram: Tensor, pattern: str, sparsity: float, iterations: int
) -> tuple[np.ndarray, int]:
    """`W + V / rho` of the last iteration, and how many there were.

    W = (H + rho I)^-1 (H W0 + rho D - V),  D = P(W + V / rho),  V += rho (W - D)
    """
    goal, hessian = weights.double().numpy(), gram.double().numpy()
    identity = np.eye(len(hessian))
    dual, kept, rho = np.zeros_like(goal), goal, 0.1
    before, done = None, 0
    for done in range(1, iterations + 1):
        right = hessian @ goal.T + rho * kept.T - dual.T
        fitted = np.linalg.solve(hessian + rho * identity, right).T
        split = fitted + dual / rho
        mask = Pattern.parse(pattern).keep(torch.from_numpy(np.abs(split)), sparsity).numpy()
        kept = split * mask
        dual = dual + rho * (fitted - kept)
        if done % EVERY == 0:
            if before is not None:
                changed = (mask != before).sum() / 2
                if not changed:
                    break
                share = changed / mask.sum()
                rho *= 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
            before = mask
    return split, done


@pytest.mark.parametrize("iterations", [1, 2, 5, 8])
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_iterations_are_those_of_the_paper(pattern: str, sparsity: float, iterations: int) -> None:
    given, weights, gram = inputs_of_admm(pattern, sparsity)
    split, _ = reference_admm(weights, gram, pattern, sparsity, iterations)
    ours = alps._admm(given, weights, gram, iterations)
    np.testing.assert_allclose(ours.numpy(), split, atol=2e-3 * np.abs(split).max())


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_iterations_end_when_the_zeros_stay(
    pattern: str, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, weights, gram = inputs_of_admm(pattern, sparsity)
    _, wanted = reference_admm(weights, gram, pattern, sparsity, 300)
    counted = []
    project = alps._projected
    monkeypatch.setattr(alps, "_projected", lambda *args: counted.append(1) or project(*args))
    split = alps._admm(given, weights, gram, 300)
    assert len(counted) < 300
    assert abs(len(counted) - wanted) <= 10 * EVERY  # a last bit may move a zero
    # More iterations change no zero.
    [kept] = given.keep([split.abs()])
    [later] = given.keep([alps._admm(given, weights, gram, len(counted)).abs()])
    assert torch.equal(kept, later)


def test_masks_of_large_layers_are_exact_for_groups_and_nearly_for_single_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = torch.rand(128, 512, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(alps, "_SAMPLE", 1 << 12)
    for pattern in map(Pattern.parse, ("2:4", "block:4x1", "row")):
        assert torch.equal(alps._quick_mask(scores, pattern, 0.5), pattern.keep(scores, 0.5))
    pattern = Pattern.parse("unstructured")
    quick = alps._quick_mask(scores, pattern, 0.7)
    assert not torch.equal(quick, pattern.keep(scores, 0.7))  # the sample was used
    assert float((~quick).float().mean()) == pytest.approx(0.7, abs=0.03)
    assert scores[quick].min() > scores[~quick].max()
    # Small layers are exact.
    small = scores[:8]
    assert torch.equal(alps._quick_mask(small, pattern, 0.7), pattern.keep(small, 0.7))
