"""Pruning to few bits: layer solvers against references, and by properties of what they minimise."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_sparse import SparsityConfig, prune_, prune_checkpoint
from hf_sparse.calibration.linalg import inverse_factor, regularised
from hf_sparse.pruning import alps, few_bits, sparsegpt
from hf_sparse.pruning.methods import METHODS
from hf_sparse.quantization import Grid, codes_of, fitted_scales, nearest_codes, rounded
from hf_sparse.structure.grids import check_grid, embedding_layers
from hf_sparse.structure.layers import promised_config, target_layers
from tests.pruning.test_solvers import error, problem
from tests.support.mixtures import tiny_mixture
from tests.support.tiny_models import tiny_batches, tiny_model

GRIDS = [Grid(4, 32), Grid(4, 64, False), Grid(8), Grid(4, None, False)]
FEW = SparsityConfig("2:4", bits=4, embedding_bits=8)


def nearest(given, weights: list[Tensor], grid: Grid) -> list[Tensor]:
    return [rounded(weight, grid, given.gram.diagonal()) for weight in weights]


def plain_gptq(weight: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    """One weight after the other, with the whole inverse of what is left at each: the slow way."""
    factor, _ = inverse_factor(gram, 0.01)
    importance = 1 / factor.diagonal().square()
    weight, left = weight.double(), regularised(gram, 0.01).double()
    found = torch.zeros_like(weight)
    size = grid.columns_per_scale(weight.shape[1])
    for j in range(weight.shape[1]):
        if j % size == 0:
            group = slice(j, j + size)
            whole = replace(grid, group_size=None)
            scales = fitted_scales(weight[:, group], whole, importance[group])
            upwards = weight[:, group].amax(1) > -weight[:, group].amin(1)
            lowest = torch.where(upwards, -7, -8)  # the end with the largest weight reaches to 8
        codes = (weight[:, j] / scales[:, 0]).round().clamp(lowest, lowest + 15)
        found[:, j] = codes * scales[:, 0]
        inverse = torch.linalg.inv(left[j:, j:])
        lost = (weight[:, j] - found[:, j]) / inverse[0, 0]
        weight[:, j:] -= lost[:, None] * inverse[0]
    return found.float()


@pytest.mark.parametrize("size", [32, None])
def test_the_sweep_is_gptq(size: int | None) -> None:
    given = problem(columns=96)
    grid = Grid(4, size)
    found = sparsegpt.rounded(replace(given, grid=grid), list(given.weights))
    wanted = plain_gptq(given.weights[0], given.gram, grid)
    off = (found[0] - wanted).abs() > 1e-4
    # A weight between two codes falls either way, and what comes behind it goes on from there.
    assert off.any(1).float().mean() < 0.1


@pytest.mark.few(2)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("unstructured", 0.6)])
def test_rounding_keeps_zeros_and_loses_less_than_nearest(
    grid: Grid, pattern: str, sparsity: float
) -> None:
    given = problem(pattern, sparsity, rows=(24, 16), columns=128)
    pruned = alps.solve(given)
    found = few_bits.rounded(replace(given, grid=grid), pruned)
    for before, after in zip(pruned, found, strict=True):
        codes_of(after, grid)
        assert not after[before == 0].any()
    # Of int8 both are hardly worse than the pruned weights.
    slack = 1.0 if grid.bits == 4 else 1.01
    assert error(given, found) < slack * error(given, nearest(given, pruned, grid))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured"])
def test_sparsegpt_prunes_and_rounds_at_once(pattern: str) -> None:
    given = problem(pattern, rows=(48,), columns=256, tokens=1024)
    grid = Grid(4, 32)
    on_grid = replace(given, grid=grid)
    joint = sparsegpt.solve(on_grid)
    after = sparsegpt.solve(given)
    codes_of(joint[0], grid)
    assert given.pattern.violations(joint[0]) == 0
    assert float((joint[0] == 0).float().mean()) >= 0.5
    assert error(given, joint) < error(given, nearest(given, after, grid))
    assert error(given, few_bits.rounded(on_grid, joint, is_rounded=True)) < error(given, joint)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_step_of_the_descent_raises_the_error(grid: Grid) -> None:
    given = replace(problem(columns=128), grid=grid)
    damped = replace(given, statistic=few_bits.damped(given))
    before = [nearest_codes(w, fitted_scales(w, grid), grid).weight() for w in given.weights]
    errors = [error(damped, before)]
    for sweeps in (1, 2, 4):
        found = few_bits.descended(given, before, sweeps)
        codes_of(found[0], grid)
        errors.append(error(damped, found))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_the_descent_ends_where_no_single_code_lowers_the_error() -> None:
    given = replace(problem(rows=(4,), columns=32), grid=Grid(4))
    gram = few_bits.damped(given).double()
    [found] = few_bits.descended(given, nearest(given, list(given.weights), Grid(4)), 30)
    dense, codes = given.weights[0].double(), codes_of(found, Grid(4))

    def squared(weight: Tensor) -> Tensor:
        lost = dense - weight.double()
        return (lost @ gram * lost).sum(1)

    least = squared(found)
    for column in range(32):
        for step in (-1, 1):
            moved = codes.codes.clone()
            moved[:, column] = (moved[:, column] + step).clamp(-8, 7)
            moved[:, column] *= codes.codes[:, column] != 0
            other = replace(codes, codes=moved).weight()
            assert (squared(other) > least * (1 - 1e-5)).all()


@pytest.mark.few(1)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_to_few_bits(method: str) -> None:
    model = tiny_model("llama")
    batches = tiny_batches("llama")
    if METHODS[method].trains:
        batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    report = prune_(model, FEW, method, batches)
    check_grid(model, FEW)
    assert report.violations == 0
    assert promised_config(model) == FEW
    assert any("22 weights were rounded to int4, rows and int8, rows" in n for n in report.notes)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embeddings.weight


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "options", [{"reconstruct": 1}, {"refine": "swaps"}, {"allocation": "alpha"}]
)
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_few_bits_go_with_what_is_composed(method: str, options: dict) -> None:
    model = tiny_model("gpt2")
    config = SparsityConfig("unstructured", 0.5, bits=4, group_size=32, symmetric=False)
    prune_(model, config, method, tiny_batches("gpt2"), **options)
    check_grid(model, config)


def test_data_make_rounding_better_behind_magnitude() -> None:
    batches = tiny_batches("llama", count=8)
    dense = tiny_model("llama").requires_grad_(False)
    wanted = dense(**batches[0]).logits
    lost = []
    for data in (None, batches):
        model = copy.deepcopy(dense)
        prune_(model, SparsityConfig("2:4", bits=4), "magnitude", data)
        lost.append(float((model(**batches[0]).logits - wanted).square().mean()))
    assert lost[1] < lost[0]


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_holds_the_grid(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    config = SparsityConfig("2:4", bits=4, group_size=32)
    prune_(model, config, "sparsegpt", tiny_batches("llama"))
    check_grid(model, config)
    assert all(layer.weight.dtype == dtype for layer in target_layers(model))


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_experts_are_rounded_each_on_its_own(family: str, method: str) -> None:
    model = tiny_mixture(family)
    config = SparsityConfig("2:4", bits=4, embedding_bits=8)
    prune_(model, config, method, tiny_batches("llama"))
    check_grid(model, config)


@pytest.mark.slow
def test_a_stream_gives_what_memory_gives(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    batches = tiny_batches("llama")
    prune_checkpoint(tmp_path / "dense", tmp_path / "out", FEW, "sparsegpt", batches)
    prune_(dense, FEW, "sparsegpt", batches)
    loaded = type(dense).from_pretrained(tmp_path / "out")
    check_grid(loaded, FEW)
    weights = dict(loaded.named_parameters())
    for name, parameter in dense.named_parameters():
        assert torch.allclose(parameter, weights[name], atol=1e-3), name
    assert embedding_layers(loaded)[0].weight.unique().numel() > 16


def test_bits_stay_where_a_method_only_makes_zeros() -> None:
    model = tiny_model("llama")
    prune_(model, SparsityConfig("unstructured", 0.0, bits=4), "magnitude")
    prune_(model, SparsityConfig("2:4"), "wanda", tiny_batches("llama"))
    assert promised_config(model) == SparsityConfig("2:4", bits=4)
    prune_(model, SparsityConfig("1:4"), "sparsegpt", tiny_batches("llama"))
    assert promised_config(model) == SparsityConfig("1:4")


def test_groups_that_do_not_divide_are_refused_before_any_work() -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    for config, name in (
        (SparsityConfig("2:4", bits=4, group_size=128), "q_proj"),
        (SparsityConfig("2:4", embedding_bits=4, group_size=128), "embed_tokens"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*128 does not divide the 32 inputs"):
            prune_(model, config, "magnitude")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_whole_experts_go_as_they_were_chosen_and_the_others_are_rounded() -> None:
    config = SparsityConfig("expert", 0.5, bits=4)
    chosen = []
    for data in (None, tiny_batches("llama")):
        model = tiny_mixture("qwen3_moe")
        prune_(model, config, "magnitude", data)
        check_grid(model, config)
        experts = [layer for layer in target_layers(model, config) if layer.stack is not None]
        chosen.append([not layer.weight.any() for layer in experts])
    assert chosen[0] == chosen[1]
    assert sum(chosen[0]) == len(chosen[0]) / 2
