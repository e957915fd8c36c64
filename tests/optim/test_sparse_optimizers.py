"""SparseAdamW, SparseSGD and shrinkage in any optimizer: against torch, and by their properties."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_sparse
from hf_sparse import SparseAdamW, SparseSGD, SparsityConfig, add_shrinkage_, sparse_param_groups
from hf_sparse.optim.parameters import sparse_groups
from hf_sparse.optim.penalties import PENALTIES
from hf_sparse.optim.shrinkage import freeze_zeros_
from hf_sparse.patterns import Pattern
from tests.support.tiny_models import tiny_model

# A penalty, and a pattern that it gives.
PAIRS = [
    ("l1", "unstructured"),
    ("reweighted_l1", "unstructured"),
    ("l0", "unstructured"),
    ("l0", "block:4x1"),
    ("l0", "2:4"),
    ("group_l2", "block:4x1"),
    ("group_l2", "row"),
    ("nm", "2:4"),
]


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(8, 12).to(dtype)), nn.Parameter(torch.randn(4, 8).to(dtype))]


def give_gradients(weights: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)


def steps(
    optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], first: int, n: int
) -> None:
    for step in range(first, first + n):
        give_gradients(weights, step)
        optimizer.step()


def zeros(weights: list[nn.Parameter]) -> int:
    return sum(int((weight == 0).sum()) for weight in weights)


@pytest.mark.parametrize(
    "setting", [{"foreach": True}, {"foreach": False}, {"fused": True}, {}, {"amsgrad": True}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_strength_it_is_adamw_bit_for_bit(setting: dict, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    sparse = SparseAdamW(ours, lr=1e-2, lam=0.0, **setting)
    dense = torch.optim.AdamW(theirs, lr=1e-2, **setting)
    steps(sparse, ours, 0, 50)
    steps(dense, theirs, 0, 50)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        for name, value in dense.state[b].items():
            assert torch.equal(sparse.state[a][name], value)


@pytest.mark.parametrize("setting", [{"foreach": True}, {"momentum": 0.9, "nesterov": True}])
def test_without_strength_it_is_sgd_bit_for_bit(setting: dict) -> None:
    ours, theirs = parameters(), parameters()
    steps(SparseSGD(ours, lr=1e-2, lam=0.0, **setting), ours, 0, 50)
    steps(torch.optim.SGD(theirs, lr=1e-2, **setting), theirs, 0, 50)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def lasso(hessian: Tensor, slope: Tensor, lam: float) -> Tensor:
    """Coordinate descent on 1/2 w H w - b w + lam |w|_1: an independent reference."""
    weight = torch.zeros_like(slope)
    for _ in range(3000):
        for i in range(len(slope)):
            rest = slope[i] - hessian[i] @ weight + hessian[i, i] * weight[i]
            weight[i] = rest.sign() * (rest.abs() - lam).clamp_min(0) / hessian[i, i]
    return weight


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adaptive AdamW", "SGD"])
def test_on_a_quadratic_it_finds_the_lasso_solution(kind: str) -> None:
    torch.manual_seed(0)
    factor = torch.randn(12, 12, dtype=torch.float64)
    hessian = factor @ factor.T / 12 + 0.2 * torch.eye(12)
    slope = torch.randn(12, dtype=torch.float64)
    wanted = lasso(hessian, slope, 0.3)
    weight = nn.Parameter(torch.randn(12, dtype=torch.float64))
    if kind == "SGD":
        optimizer: Any = SparseSGD([weight], lr=0.2, lam=0.3)
    else:
        optimizer = SparseAdamW([weight], lr=1e-2, weight_decay=0, lam=0.3, scale="adaptive")
    for step in range(6000):
        if step in (3000, 4500) and kind != "SGD":
            optimizer.param_groups[0]["lr"] /= 10
        weight.grad = (hessian @ weight - slope).detach()
        optimizer.step()
    assert 0 < int((wanted == 0).sum()) < 12
    assert (weight - wanted).abs().max() < 1e-4
    assert torch.equal(weight == 0, wanted == 0)


@pytest.mark.few(5)
@pytest.mark.parametrize(("penalty", "pattern"), PAIRS)
@pytest.mark.parametrize("optimizer_cls", [SparseAdamW, SparseSGD])
def test_strength_makes_exact_zeros_of_the_pattern(
    optimizer_cls: Any, penalty: str, pattern: str
) -> None:
    weights = parameters()
    strength = 20.0 if penalty != "l0" else 200.0
    optimizer = optimizer_cls(weights, lr=1e-3, lam=strength, penalty=penalty, pattern=pattern)
    steps(optimizer, weights, 0, 40)
    parsed = Pattern.parse(pattern)
    found = zeros(weights)
    assert 0 < found < sum(weight.numel() for weight in weights)
    if pattern == "2:4":
        before = sum(parsed.violations(weight) for weight in parameters())
        assert sum(parsed.violations(weight) for weight in weights) < before / 2
    else:
        assert all(parsed.follows(weight.detach()) for weight in weights)


def test_every_penalty_is_tried() -> None:
    assert {penalty for penalty, _ in PAIRS} == set(PENALTIES)


@pytest.mark.parametrize("scale", ["lr", "constant", "adaptive"])
def test_scales_are_the_documented_strengths(scale: str) -> None:
    weights = parameters()
    optimizer = SparseAdamW(weights, lr=1e-3, lam=0.02, scale=scale, weight_decay=0.0)
    reference = parameters()
    plain = torch.optim.AdamW(reference, lr=1e-3, weight_decay=0.0)
    give_gradients(weights, 0)
    give_gradients(reference, 0)
    optimizer.step()
    plain.step()
    for weight, moved in zip(weights, reference, strict=True):
        root = plain.state[moved]["exp_avg_sq"].div(1 - 0.999).sqrt() + 1e-8
        tau = {"lr": 2e-5, "constant": 0.02, "adaptive": 2e-5 / root}[scale]
        wanted = moved.sign() * (moved.abs() - tau).clamp_min(0)
        assert torch.allclose(weight, wanted, atol=1e-7)


def test_reweighting_shrinks_small_weights_more_and_goes_in_rounds() -> None:
    weight = nn.Parameter(torch.tensor([[0.1, 1.0, -3.0, 0.5]]))
    optimizer = SparseSGD(
        [weight], lr=1.0, lam=0.01, penalty="reweighted_l1", reweight_every=3, reweight_eps=0.5
    )
    alphas = []
    for _ in range(4):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        alphas.append(optimizer.state[weight]["alpha"].clone())
    start = torch.tensor([[0.1, 1.0, -3.0, 0.5]])
    assert torch.allclose(alphas[0], 0.5 / (start.abs() + 0.5))
    assert torch.equal(alphas[0], alphas[1])
    assert torch.equal(alphas[1], alphas[2])
    assert (alphas[3] > alphas[2]).all()  # the weights have shrunk since
    shrunk = start - 3 * 0.01 * alphas[0] * start.sign() - 0.01 * alphas[3] * start.sign()
    assert torch.allclose(weight, shrunk)


@pytest.mark.parametrize("make", [SparseAdamW, SparseSGD, "muon", "lion-like"])
def test_frozen_zeros_never_grow_again(make: Any) -> None:
    weights = parameters()
    with torch.no_grad():
        for weight in weights:
            weight[:, ::3] = 0
    if make == "muon":
        optimizer: Any = add_shrinkage_(torch.optim.Muon(weights, lr=1e-2))
    elif make == "lion-like":
        optimizer = add_shrinkage_(torch.optim.Rprop(weights))
    else:
        optimizer = make(weights, lr=1e-2, weight_decay=0.1)
        give_gradients(weights, 99)
        optimizer.state.clear()
    masks = [weight == 0 for weight in weights]
    freeze_zeros_(optimizer)
    before = [weight.detach().clone() for weight in weights]
    steps(optimizer, weights, 0, 10)
    for weight, mask, old in zip(weights, masks, before, strict=True):
        assert torch.equal(weight == 0, mask)
        assert (weight[~mask] != old[~mask]).all()


def test_frozen_zeros_survive_old_momentum_and_a_closure() -> None:
    weights = parameters()
    optimizer = SparseAdamW(weights, lr=1e-2, lam=0.0)
    steps(optimizer, weights, 0, 5)
    with torch.no_grad():
        weights[0][0] = 0
    freeze_zeros_(optimizer)
    optimizer.zero_grad()

    def closure() -> float:
        give_gradients(weights, 7)
        return 0.0

    optimizer.step(closure)
    assert (weights[0][0] == 0).all()
    assert zeros(weights) == 12


@pytest.mark.parametrize(("penalty", "pattern"), PAIRS)
@pytest.mark.parametrize("frozen", [False, True])
def test_resume_is_bit_exact(penalty: str, pattern: str, frozen: bool, tmp_path: Any) -> None:
    def make(weights: list[nn.Parameter]) -> SparseAdamW:
        return SparseAdamW(
            weights, lr=1e-2, lam=0.5, penalty=penalty, pattern=pattern, reweight_every=4
        )

    weights = parameters()
    optimizer = make(weights)
    steps(optimizer, weights, 0, 6)
    if frozen:
        with torch.no_grad():
            weights[0][0] = 0
        freeze_zeros_(optimizer)
    torch.save([weights, optimizer.state_dict()], tmp_path / "state.pt")
    steps(optimizer, weights, 6, 6)

    again, state = torch.load(tmp_path / "state.pt", weights_only=False)
    resumed = make(again)
    resumed.load_state_dict(state)
    steps(resumed, again, 6, 6)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    assert resumed.param_groups[0]["frozen"] is frozen


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_go_on_shrinking(copier: Any) -> None:
    weights = parameters()
    optimizer = SparseAdamW(weights, lr=1e-2, lam=5.0)
    steps(optimizer, weights, 0, 2)
    twin = copier(optimizer)
    others = twin.param_groups[0]["params"]
    steps(optimizer, weights, 2, 10)
    steps(twin, others, 2, 10)
    assert zeros(others) == zeros(weights) > 0


def test_hooks_run_once_per_step() -> None:
    weights = parameters()
    optimizer = SparseAdamW(weights, lr=1e-2, lam=1.0)
    torch.optim.AdamW(parameters())  # torch patches the step of every class it makes
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.load_state_dict(optimizer.state_dict())
    steps(optimizer, weights, 0, 3)
    assert len(calls) == 3
    assert optimizer.param_groups[0]["shrink_steps"] == 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_shrinks_nothing(fused: bool) -> None:
    weights = parameters()
    optimizer = SparseAdamW(weights, lr=1e-2, lam=1.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [weight.detach().clone() for weight in weights]
    loss = sum((weight * weight).sum() for weight in weights)
    scaler.scale(loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    optimizer.zero_grad()
    scaler.scale(sum((weight * weight).sum() for weight in weights)).backward()
    scaler.step(optimizer)
    assert all((a.abs() < b.abs()).all() for a, b in zip(weights, before, strict=True))
    assert optimizer.param_groups[0]["shrink_steps"] == 1


def test_parameters_without_gradient_are_left_alone() -> None:
    weights = parameters()
    optimizer = SparseAdamW(weights, lr=1e-2, lam=1e3)
    weights[0].grad = torch.zeros_like(weights[0])
    before = weights[1].detach().clone()
    optimizer.step()
    assert torch.equal(weights[1], before)
    assert (weights[0] == 0).all()


def test_schedulers_and_clipping_work_as_with_adamw() -> None:
    weights = parameters()
    optimizer = SparseAdamW(weights, lr=1e-2, lam=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 10)
    for step in range(10):
        give_gradients(weights, step)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        scheduler.step()
    before = [weight.detach().clone() for weight in weights]
    steps(optimizer, weights, 10, 1)  # a rate of 0: neither step nor shrinkage
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_bf16_weights_are_shrunk_in_fp32() -> None:
    weights, wide = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    optimizer = SparseSGD(weights, lr=0.1, lam=0.3)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for weight, old in zip(weights, wide, strict=True):
        wanted = old.float().sign() * (old.float().abs() - 0.03).clamp_min(0)
        assert torch.equal(weight, wanted.bfloat16())


@pytest.mark.parametrize(
    "optimizer_cls", [torch.optim.Adam, torch.optim.NAdam, torch.optim.Muon, torch.optim.Adafactor]
)
def test_any_optimizer_can_shrink(optimizer_cls: Any) -> None:
    weights = parameters()
    optimizer = add_shrinkage_(optimizer_cls(weights, lr=1e-2), lam=5.0)
    steps(optimizer, weights, 0, 10)
    plain = parameters()
    steps(optimizer_cls(plain, lr=1e-2), plain, 0, 10)
    assert zeros(weights) > 0
    assert zeros(plain) == 0


def test_adaptive_needs_the_moments() -> None:
    with pytest.raises(ValueError, match="exp_avg_sq"):
        add_shrinkage_(torch.optim.SGD(parameters(), lr=1e-2), lam=1.0, scale="adaptive")

    class Lion(torch.optim.Adam):
        """Has betas, but no second moments."""

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for weight in group["params"]:
                    self.state[weight]["exp_avg"] = weight.grad.clone()

    optimizer = add_shrinkage_(Lion(parameters()), lam=1.0, scale="adaptive")
    with pytest.raises(ValueError, match="exp_avg_sq"):
        steps(optimizer, optimizer.param_groups[0]["params"], 0, 1)


def test_only_optimizers_with_shrinkage_and_zeros_can_be_frozen() -> None:
    with pytest.raises(ValueError, match="AdamW has no shrinkage"):
        freeze_zeros_(torch.optim.AdamW(parameters()))
    with pytest.raises(ValueError, match="no zeros to keep"):
        freeze_zeros_(SparseAdamW(parameters()))


def test_weight_decay_is_the_optimizers_unless_given() -> None:
    model, config = tiny_model("bert"), SparsityConfig(sparsity=0.5)
    optimizer = SparseAdamW(sparse_param_groups(model, config), weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]
    groups = sparse_param_groups(model, config, weight_decay=0.2)
    optimizer = SparseAdamW(groups, weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2, 0.0]


@pytest.mark.few(4)
@pytest.mark.parametrize("family", ["bert", "albert", "gpt2", "llama"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x1", "2:4"])
def test_groups_of_a_model_hold_each_weight_once(family: str, pattern: str) -> None:
    model = tiny_model(family)
    config = SparsityConfig(pattern, 0.5)
    groups = sparse_param_groups(model, config, weight_decay=0.1)
    listed = [id(parameter) for group in groups for _, parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters())
    optimizer = SparseAdamW(groups, lr=1e-2, lam=20.0, penalty="l0" if pattern[0] != "2" else "nm")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    dense = {name: value for name, value in model.named_parameters() if "LayerNorm" in name}
    for _ in range(3):
        optimizer.step()
    report = hf_sparse.measure_sparsity(model, config)
    assert report.zeros > 0
    assert all((value != 0).any() for value in dense.values())
    if pattern == "block:4x1":
        assert report.violations == 0
    names = {name for group in sparse_groups(optimizer) for name in group["param_names"]}
    assert names == {tensor.name for tensor in report.tensors}
    vectors = [group for group in groups if group["params"][0].ndim == 1]
    assert vectors
    assert all(group["weight_decay"] == 0 for group in vectors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": -1.0}, "lam is -1.0"),
        ({"lam": float("nan")}, "lam is nan"),
        ({"lam": "1"}, "lam is '1'"),
        ({"penalty": "l3"}, "unknown penalty 'l3'"),
        ({"scale": "adam"}, "unknown scale 'adam'"),
        ({"pattern": "3:2"}, "N:M"),
        ({"penalty": "l1", "pattern": "2:4"}, "does not give pattern '2:4'"),
        ({"penalty": "group_l2"}, "does not give pattern 'unstructured'"),
        ({"scale": "adaptive", "pattern": "row"}, "no closed form"),
        ({"pattern": "block:5x1"}, "cannot be divided"),
        ({"reweight_every": 0}, "reweight_every"),
        ({"reweight_eps": -1.0}, "reweight_eps"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAdamW(parameters(), lr=1e-3, **settings)
    with pytest.raises(ValueError, match=message):
        add_shrinkage_(torch.optim.Adam(parameters()), **settings)
    optimizer = SparseAdamW(parameters(), lr=1e-3)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(1), **settings})


def test_vectors_are_refused_for_matrix_patterns() -> None:
    with pytest.raises(ValueError, match=r"shape \(8,\).*wants matrices"):
        SparseAdamW([nn.Parameter(torch.ones(8))], lam=1.0, pattern="2:4")


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown shrinkage settings lambda_"):
        add_shrinkage_(torch.optim.Adam(parameters()), lambda_=1.0)
    with pytest.raises(ValueError, match="SGD has none"):
        SparseSGD(parameters(), scale="adaptive")
    zero = nn.Parameter(torch.ones(4, 4))
    zero.ds_id = 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="DeepSpeed ZeRO"):
        SparseAdamW([zero], lam=1.0)
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="matches no layer"):
        sparse_param_groups(model, SparsityConfig(sparsity=0.5, targets="nothing"))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="targets are frozen"):
        sparse_param_groups(model, SparsityConfig(sparsity=0.5))


def test_resume_with_other_settings_is_refused() -> None:
    saved = SparseAdamW(parameters(), lam=1.0, pattern="block:4x1").state_dict()
    with pytest.raises(ValueError, match="saved with penalty='group_l2'"):
        SparseAdamW(parameters(), lam=1.0, pattern="2:4").load_state_dict(saved)
    with pytest.raises(ValueError, match="pattern='block:4x1'"):
        SparseAdamW(parameters(), lam=1.0, pattern="block:2x1").load_state_dict(saved)
    with pytest.raises(ValueError, match="without shrinkage"):
        SparseAdamW(parameters()).load_state_dict(torch.optim.AdamW(parameters()).state_dict())


def test_groups_added_later_to_any_optimizer_are_checked_and_shrunk() -> None:
    weights, later = parameters(), parameters(1)
    optimizer = add_shrinkage_(torch.optim.SGD(weights, lr=1e-2), lam=5.0)
    optimizer.add_param_group({"params": later})
    steps(optimizer, [*weights, *later], 0, 5)
    assert zeros(later) > 0
    optimizer = add_shrinkage_(torch.optim.SGD(parameters(), lr=1e-2), lam=5.0, pattern="2:4")
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 6))]})
    with pytest.raises(ValueError, match="not divisible by M = 4"):
        optimizer.step()


@pytest.mark.parametrize("lam", [float("nan"), -1.0, float("inf")])
def test_a_strength_changed_to_nonsense_is_noticed(lam: float) -> None:
    weights = parameters()
    optimizer = SparseAdamW(weights, lr=1e-3, lam=1.0)
    optimizer.param_groups[0]["lam"] = lam
    with pytest.raises(ValueError, match="lam is"):
        steps(optimizer, weights, 0, 1)


def test_a_rate_of_zero_shrinks_nothing() -> None:
    weights = parameters()
    optimizer = SparseAdamW(weights, lr=0.0, lam=0.1, scale="constant")
    before = [weight.detach().clone() for weight in weights]
    steps(optimizer, weights, 0, 3)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_a_copy_of_any_optimizer_can_be_frozen() -> None:
    weights = parameters()
    twin = copy.deepcopy(add_shrinkage_(torch.optim.SGD(weights, lr=1e-2)))
    others = twin.param_groups[0]["params"]
    with torch.no_grad():
        others[0][0] = 0
    freeze_zeros_(twin)
    steps(twin, others, 0, 3)
    assert (others[0][0] == 0).all()
