"""The layer solvers, against independent references and by properties of what they minimise."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hf_sparse import Pattern
from hf_sparse.calibration.linalg import (
    FastProducts,
    add_gram_,
    cholesky,
    inverse_factor,
    matmul,
    mirror_,
    regularised,
)
from hf_sparse.pruning import alps, prox_local, sparsegpt, swaps, wanda
from hf_sparse.pruning.problem import Notes, Problem
from tests.support.closeness import same
from tests.support.layer_error import layer_error

PATTERNS = [("unstructured", 0.5), ("unstructured", 0.7), ("2:4", 0.5), ("4:8", 0.5)]


def problem(
    pattern: str = "unstructured",
    sparsity: float = 0.5,
    *,
    rows: tuple[int, ...] = (24,),
    columns: int = 64,
    tokens: int = 512,
    seed: int = 0,
) -> Problem:
    """Random layers, with inputs that are correlated and of very different sizes, as real ones."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mixed = random(tokens, columns) @ (torch.eye(columns) + 0.3 * random(columns, columns))
    inputs = mixed * torch.exp(random(columns))
    gram = (inputs.double().T @ inputs.double()).float()
    return Problem(
        [f"layer{i}" for i in range(len(rows))],
        [random(r, columns) for r in rows],
        gram,
        tokens,
        Pattern.parse(pattern),
        [sparsity] * len(rows),
    )


def error(given: Problem, pruned: list[Tensor]) -> float:
    return layer_error(given.joined, torch.cat(pruned), given.gram)


def reference_sparsegpt(given: Problem, block_size: int = 16) -> Tensor:
    """The published algorithm, column after column in fp64, written from its description."""
    gram = given.gram.double().clone()
    weight = given.joined.double()
    gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    pattern, sparsity = given.pattern, given.sparsities[0]
    columns = weight.shape[1]
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        saliency = weight[:, start:stop] ** 2 / upper.diagonal()[start:stop] ** 2
        if str(pattern) == "unstructured":
            cut = saliency.flatten().sort().values[int(saliency.numel() * sparsity) - 1]
            mask = saliency <= cut
        for column in range(start, stop):
            n = column - start
            if str(pattern) != "unstructured" and n % pattern.m == 0:
                part = weight[:, column : column + pattern.m]
                part = part**2 / upper.diagonal()[column : column + pattern.m] ** 2
                order = part.argsort(dim=1)[:, : pattern.m - pattern.n]
                group = torch.zeros_like(part, dtype=torch.bool).scatter_(1, order, True)
            pruned = mask[:, n] if str(pattern) == "unstructured" else group[:, n % pattern.m]
            lost = torch.where(pruned, weight[:, column], 0.0) / upper[column, column]
            weight[:, column + 1 :] -= lost[:, None] * upper[column, column + 1 :]
            weight[:, column] = torch.where(pruned, 0.0, weight[:, column])
    return weight.float()


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_sparsegpt_is_as_good_as_the_published_algorithm(pattern: str, sparsity: float) -> None:
    given = problem(pattern, sparsity, rows=(20,))  # whole counts in each 16 columns
    pruned = sparsegpt.solve(given, block_size=16)
    reference = reference_sparsegpt(given)
    assert error(given, pruned) <= 1.01 * layer_error(given.joined, reference, given.gram)
    same = ((pruned[0] == 0) == (reference == 0)).float().mean()
    assert same > 0.98


@pytest.mark.parametrize("solve", [wanda.solve, sparsegpt.solve, alps.solve])
@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [*PATTERNS, ("block:4x1", 0.5), ("block:2x4", 0.25), ("row", 0.25), ("column", 0.5)],
)
def test_counts_are_exact_and_layers_that_share_inputs_keep_their_own(
    solve, pattern: str, sparsity: float
) -> None:
    given = problem(pattern, sparsity, rows=(24, 8, 16))
    before = given.joined
    pruned = solve(given)
    for weight in pruned:
        assert given.pattern.follows(weight)
        assert int((weight == 0).sum()) == round(sparsity * weight.numel())
    assert torch.equal(given.joined, before)


def test_alps_has_the_least_error() -> None:
    for pattern, sparsity in PATTERNS:
        given = problem(pattern, sparsity, rows=(64,))
        by_wanda, by_sparsegpt, by_alps = (
            error(given, method.solve(given)) for method in (wanda, sparsegpt, alps)
        )
        assert by_alps < min(by_sparsegpt, by_wanda)


def test_weights_that_are_updated_cannot_be_improved_by_scaling() -> None:
    """At the optimum on a support the error is orthogonal to the layer's output."""
    given = problem("unstructured", 0.6)
    pruned = alps.solve(given, damping=1e-4, refit_steps=200)[0]
    residual = matmul(given.joined - pruned, given.gram)
    scale = matmul(given.joined, given.gram).abs().max()
    assert (residual * (pruned != 0)).abs().max() < 1e-3 * scale


def test_refit_equals_least_squares() -> None:
    given = problem("unstructured", 0.5, rows=(6,), columns=16)
    gram = regularised(given.gram, 0.01)
    dense = given.joined
    mask = torch.rand(dense.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    fitted = alps.refit(dense * mask, mask, dense, gram, steps=100)
    for row, kept, found in zip(dense, mask, fitted, strict=True):
        inside = gram[kept][:, kept].double()
        expected = torch.linalg.solve(inside, gram[kept].double() @ row.double())
        torch.testing.assert_close(found[kept].double(), expected, rtol=2e-3, atol=2e-3)
        assert (found[~kept] == 0).all()


@pytest.mark.parametrize("updates", [False, True])
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_swaps_only_lower_the_error(pattern: str, sparsity: float, updates: bool) -> None:
    given = problem(pattern, sparsity, rows=(16, 8))
    pruned = (sparsegpt if updates else wanda).solve(given)
    refined = swaps.refine(given, pruned, updates=updates)
    for weight, found in zip(pruned, refined, strict=True):
        assert given.pattern.follows(found)
        assert torch.equal((weight == 0).sum(dim=1), (found == 0).sum(dim=1))
        if not updates:
            dense = given.weights[0] if len(found) == 16 else given.weights[1]
            assert torch.equal(found[found != 0], dense[found != 0])
    assert error(given, refined) < error(given, pruned)


def test_a_swap_is_the_best_of_all() -> None:
    """With as many candidates as places, one round takes the best exchange of a row."""
    given = problem("unstructured", 0.5, rows=(12,), columns=12)
    pruned = wanda.solve(given)[0]
    swapped = swaps.refine(given, [pruned], updates=False, rounds=1)[0]
    dense, gram = given.joined.double(), given.gram.double()
    for row in range(12):
        kept = (pruned[row] != 0).nonzero()[:, 0].tolist()
        gone = (pruned[row] == 0).nonzero()[:, 0].tolist()

        def lost(mask: set[int], row: int = row) -> float:
            change = dense[row].clone()
            change[sorted(mask)] = 0
            return float(change @ gram @ change)

        tried = [lost((set(kept) - {p}) | {q}) for p, q in itertools.product(kept, gone)]
        best = min([*tried, lost(set(kept))])
        found = lost(set((swapped[row] != 0).nonzero()[:, 0].tolist()))
        assert found == pytest.approx(best, rel=1e-4)


def test_prox_local_finds_better_masks_than_magnitude() -> None:
    given = problem("2:4", 0.5, rows=(64,))
    learned = prox_local.solve(given)
    kept = learned[0] != 0
    assert torch.equal(learned[0][kept], given.joined[kept])
    by_magnitude = [w * given.pattern.keep(w.abs(), 0.5) for w in given.weights]
    assert given.pattern.follows(learned[0])
    assert error(given, learned) < error(given, by_magnitude)
    with pytest.raises(ValueError, match="learns N:M masks"):
        prox_local.solve(problem("unstructured", 0.5))


@pytest.mark.parametrize(
    ("solve", "pattern", "sparsity"),
    [
        (sparsegpt.solve, "2:4", 0.5),
        (sparsegpt.solve, "unstructured", 0.25),
        (alps.solve, "2:4", 0.5),
        (alps.solve, "unstructured", 0.25),
        (prox_local.solve, "2:4", 0.5),  # which takes no other patterns
    ],
)
def test_dead_inputs_lose_their_weights_first_and_counts_stay_exact(
    solve, pattern: str, sparsity: float
) -> None:
    """Three of the first four inputs are always zero, and half of the rest."""
    given = problem(pattern, sparsity)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[[0, 1, 2]] = True
    dead[32:] = True
    given.gram[dead] = 0
    given.gram[:, dead] = 0
    pruned = solve(given)[0]
    assert torch.isfinite(pruned).all()
    assert given.pattern.follows(pruned)
    assert int((pruned == 0).sum()) == sparsity * pruned.numel()
    kept = (pruned != 0) & dead
    assert torch.equal(pruned[kept], given.joined[kept])
    if pattern == "unstructured":  # half of the inputs are dead: nothing else is pruned
        assert (pruned[:, ~dead] != 0).all() or solve is sparsegpt.solve


@pytest.mark.parametrize("solve", [wanda.solve, sparsegpt.solve, alps.solve, prox_local.solve])
def test_layers_of_zeros_stay_so(solve) -> None:
    given = problem("2:4", 0.5)
    given.weights[0].zero_()
    assert (solve(given)[0] == 0).all()


def test_too_few_tokens_raise_the_damping_and_are_told() -> None:
    given = problem(tokens=16)
    assert given.damping(0.01) == pytest.approx(0.04)
    (line,) = given.notes.lines()
    assert "saw only 16 calibration tokens for 64 input features" in line
    assert torch.isfinite(sparsegpt.solve(given)[0]).all()


def test_a_matrix_that_is_not_positive_definite_gets_more_damping_or_an_error() -> None:
    gram = torch.eye(4)
    gram[0, 1] = gram[1, 0] = 1.05
    factor, used = cholesky(gram, 0.01)
    assert used > 0.01
    torch.testing.assert_close(factor @ factor.T, regularised(gram, used))
    with pytest.raises(ValueError, match="not positive definite"):
        cholesky(torch.full((3, 3), torch.nan), 0.01)


def test_swaps_refuse_patterns_of_whole_groups() -> None:
    with pytest.raises(ValueError, match="refine='swaps'"):
        swaps.check_pattern(Pattern.parse("row"))


@pytest.mark.parametrize("columns", [1, 300, 700])
def test_gram_matrices_and_their_factors(columns: int) -> None:
    inputs = torch.randn(900, columns, generator=torch.Generator().manual_seed(0))
    gram = torch.zeros(columns, columns)
    for part in inputs.split(400):
        add_gram_(gram, part)
    mirror_(gram)
    expected = inputs.double().T @ inputs.double()
    torch.testing.assert_close(gram.double(), expected, rtol=1e-5, atol=1e-3)
    upper, used = inverse_factor(gram, 0.01)
    assert used == 0.01
    assert torch.equal(upper, upper.triu())
    product = upper.double().T @ upper.double() @ regularised(gram, 0.01).double()
    torch.testing.assert_close(product, torch.eye(columns).double(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_fast_products_are_the_same_products() -> None:
    layer = torch.nn.Linear(48, 32)
    inputs = torch.randn(2, 5, 48)
    with FastProducts():
        fast = layer(inputs)
        half = layer.bfloat16()(inputs.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(fast, layer.float()(inputs), rtol=1e-2, atol=1e-2)
    left, right = torch.randn(7, 9).double(), torch.randn(5, 9).double()
    assert same(matmul(left, right), left @ right.T, rtol=1e-12, atol=1e-12)


def test_notes_about_many_layers_are_one_line() -> None:
    notes, other = Notes(), Notes()
    notes.add(["a"], "is odd.")
    other.add(["b", "c"], "is odd.")
    notes.merge([other])
    assert notes.lines() == ("a and 2 more is odd.",)


def test_masks_of_sparsegpt_are_chosen_for_whole_groups() -> None:
    """In blocks of at least the width that was asked for, and less than a group more."""
    shape = torch.Size((8, 96))
    for notation in ("unstructured", "2:4", "4:8", "block:2x6", "row"):
        pattern = Pattern.parse(notation)
        group = pattern.group_shape(*shape)[1]
        for asked in (1, 12, 50):
            width = sparsegpt._block_width(pattern, shape, asked)
            assert width % group == 0
            assert asked <= width < asked + group
    assert sparsegpt._block_width(Pattern.parse("column"), shape, 12) == 96
