"""Whole heads and neurons: scores, refitting, training, and what the patterns mean."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_sparse
from hf_sparse import Pattern, SparsityConfig, prune_, shrink_
from hf_sparse.patterns import Head
from hf_sparse.pruning import refit
from hf_sparse.pruning.problem import Problem
from hf_sparse.structure.parts import PARTS
from hf_sparse.structure.targets import Targets
from hf_sparse.structure.units import BlockUnits, find_units
from tests.support.any_models import build, classes_of, tiny_config
from tests.support.crosses import pairwise
from tests.support.layer_error import layer_error
from tests.support.tiny_models import tiny_batches, tiny_classifier, tiny_model

CAUSAL = [family for family in PARTS if family not in ("bert", "albert")]
UNITS = ("head", "column")


def layer_and_width(units: BlockUnits, pattern: str) -> tuple[Any, int]:
    """The layer that a unit enters, and the columns that one unit has there."""
    size = units.size
    if pattern == "head":
        return units.out, units.head_dim * size.heads // size.key_heads
    return units.down, 1


def labelled(family: str) -> list[dict[str, Tensor]]:
    """Batches of 2 x 12 tokens with labels for a classifier."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 3, (4, 2), generator=generator)
    return [
        {**batch, "labels": row}
        for batch, row in zip(tiny_batches(family, count=4, padded=True), labels, strict=True)
    ]


def test_the_pattern_of_input_heads() -> None:
    pattern = Pattern.parse("head_in:4")
    assert pattern == Head(4, inputs=True)
    assert str(pattern) == "head_in:4"
    scores = torch.arange(24.0).view(2, 12)
    mask = pattern.keep(scores, 1 / 3)
    assert mask.int().tolist() == [[0] * 4 + [1] * 8] * 2
    # The same as rows of the transpose.
    assert torch.equal(mask, Pattern.parse("head:4").keep(scores.T, 1 / 3).T)
    assert pattern.violations(mask * 1.0) == 0
    assert pattern.violations(torch.eye(12)) == 3
    with pytest.raises(ValueError, match="cannot be divided into groups of 2 x 5"):
        Pattern.parse("head_in:5").keep(scores, 0.5)
    with pytest.raises(ValueError, match="wanted head_in:D with D >= 1"):
        Pattern.parse("head_in:0")


@pytest.mark.parametrize("family", PARTS)
def test_patterns_without_targets_name_the_layers_of_units(family: str) -> None:
    model = tiny_model(family)
    found = find_units(model)
    for pattern, wanted in (
        ("head", [units.out.name for units in found]),
        ("column", [units.down.name for units in found]),
        ("row", [units.layer(units.parts.up).name for units in found]),
    ):
        targets = Targets.of(model, SparsityConfig(pattern, 0.5))
        assert targets.whole_units
        assert [layer.name for layer in targets.layers] == wanted
        again = Targets.of(model, targets.config)
        assert not again.whole_units
        assert (again.config, again.layers) == (targets.config, targets.layers)
    width = {"llama": 16, "mistral": 16, "qwen2": 16, "qwen3": 32}.get(family, 8)
    assert Targets.of(model, SparsityConfig("head", 0.5)).pattern == Head(width, inputs=True)


@pytest.mark.few(7)
@pairwise(
    "family, pattern, method", CAUSAL, UNITS, ["magnitude", "wanda", "taylor", "sparsegpt", "alps"]
)
def test_whole_units_go_and_shrink_takes_them(family: str, pattern: str, method: str) -> None:
    model, batches = tiny_model(family), tiny_batches(family)
    sizes = [units.size for units in find_units(model)]
    report = prune_(model, SparsityConfig(pattern, 0.5), method, batches)
    assert (report.violations, report.sparsity) == (0, 0.5)
    for units in find_units(model):
        # What feeds a zero column is zero, its bias too.
        layer, width = layer_and_width(units, pattern)
        unused = (layer.weight == 0).all(dim=0)
        assert int(unused.sum()) == len(unused) // 2
        if pattern == "column":
            for entry in units.entries:
                assert torch.equal((entry.weight == 0).all(dim=1), unused)
                bias = entry.module.bias
                assert bias is None or not bias[unused].any()
        elif len(units.projections) == 3:
            queries, keys, values = units.projections
            assert torch.equal((queries.weight == 0).all(dim=1), unused)
            groups = unused.view(-1, width)[:, : units.head_dim].flatten()
            for projection in (keys, values):
                assert torch.equal((projection.weight == 0).all(dim=1), groups)
        else:
            assert torch.equal((units.projections[0].weight == 0).all(dim=1), unused.repeat(3))
    with torch.no_grad():
        wanted = model(**batches[0]).logits
        after = shrink_(model).after
        torch.testing.assert_close(model(**batches[0]).logits, wanted, atol=1e-5, rtol=1e-5)
    for size, full in zip(after, sizes, strict=True):
        if pattern == "head":
            halves = (full.heads // 2, full.key_heads // 2, full.neurons)
            assert (size.heads, size.key_heads, size.neurons) == halves
        else:
            assert (size.heads, size.neurons) == (full.heads, full.neurons // 2)


def gate_effects(model: nn.Module, batches: list[Any], pattern: str) -> dict[str, Tensor]:
    """Taylor scores by their meaning: the gradient of a gate of 1 in front of each unit."""
    gates, hooks = {}, []

    def gated(gate: Tensor, width: int, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] * gate.repeat_interleave(width),)

    for units in find_units(model):
        layer, width = layer_and_width(units, pattern)
        gate = torch.ones(layer.weight.shape[1] // width, requires_grad=True)
        gates[layer.name] = gate
        hooks.append(layer.module.register_forward_pre_hook(partial(gated, gate, width)))
    scores = {name: torch.zeros_like(gate) for name, gate in gates.items()}
    for batch in batches:
        given = batch if "labels" in batch else {**batch, "labels": batch["input_ids"]}
        grads = torch.autograd.grad(model(**given).loss, list(gates.values()))
        for name, grad in zip(gates, grads, strict=True):
            scores[name] += grad.square()
    for hook in hooks:
        hook.remove()
    return scores


@pytest.mark.few(5)
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("pattern", UNITS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_taylor_equals_the_gradients_of_gates(family: str, pattern: str, scope: str) -> None:
    model: Any = tiny_classifier() if family == "bert" else tiny_model(family)
    batches = labelled("bert") if family == "bert" else tiny_batches(family)
    scores = gate_effects(model, batches, pattern)
    config = SparsityConfig(pattern, 0.5)
    prune_(model, config, "taylor", batches, scope=scope)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    every = torch.cat(list(scores.values()))
    middle = every.sort().values[len(every) // 2 - 1 : len(every) // 2 + 1].mean()
    for units in find_units(model):
        layer, width = layer_and_width(units, pattern)
        kept = (layer.weight != 0).any(dim=0).view(-1, width).any(dim=1)
        score = scores[layer.name]
        if scope == "global":
            wanted = score > middle
        else:
            wanted = score > score.sort().values[len(score) // 2 - 1]
        # Scores are from bfloat16 products: units at the edge may change sides.
        assert (kept == wanted).float().mean() >= (1.0 if pattern == "head" else 0.9)


def test_taylor_removes_what_the_loss_does_not_need() -> None:
    """Neurons that change the loss little, against those that the same score calls important."""
    model, batches = tiny_classifier(), labelled("bert")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else None
        before = sum(float(model(**batch).loss) for batch in batches)
    scores = gate_effects(model, batches, "column")
    changes = []
    for chosen in (False, True):
        other = tiny_classifier()
        other.load_state_dict(model.state_dict())
        for units in find_units(other):
            order = scores[units.down.name].argsort(descending=chosen)
            units.down.weight[:, order[:16]] = 0
        with torch.no_grad():
            changes.append(abs(sum(float(other(**batch).loss) for batch in batches) - before))
    assert changes[0] < changes[1]


def test_taylor_needs_labels_and_gradients() -> None:
    config = SparsityConfig("head", 0.5)
    with pytest.raises(ValueError, match=r"method 'taylor' needs the loss of BertFor.*no labels"):
        prune_(tiny_classifier(), config, "taylor", tiny_batches("bert"))
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        prune_(tiny_model("llama"), config, "taylor", tiny_batches("llama"))
    with pytest.raises(ValueError, match="scope is 'all'"):
        prune_(tiny_model("llama"), config, "taylor", tiny_batches("llama"), scope="all")


@pytest.mark.parametrize("family", PARTS)
@torch.no_grad()
def test_wanda_takes_the_heads_of_smallest_weight_times_input(family: str) -> None:
    model, batches = tiny_model(family), tiny_batches(family)
    first = find_units(model)[0]
    width = layer_and_width(first, "head")[1]
    inputs: list[Tensor] = []
    hook = first.out.module.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    for batch in batches:
        model(**batch)
    hook.remove()
    norms = torch.cat(inputs).double().square().sum(dim=0)
    scores = (first.out.weight.double().square().sum(dim=0) * norms).view(-1, width).sum(dim=1)
    count = len(scores) // 2
    prune_(model, SparsityConfig("head", 0.5), "wanda", batches)
    gone = (first.out.weight == 0).all(dim=0).view(-1, width).all(dim=1)
    if family != "albert":  # its one block sees what it gave itself, too
        assert set(gone.nonzero()[:, 0].tolist()) == set(scores.argsort()[:count].tolist())
    assert int(gone.sum()) == count


def random_problem(pattern: str, tokens: int = 200, features: int = 12) -> tuple[Problem, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(features, features, generator=generator)
    inputs = torch.randn(tokens, features, generator=generator) @ mixed
    weight = torch.randn(5, features, generator=generator)
    gram = inputs.T @ inputs
    return Problem(["layer"], [weight], gram, tokens, Pattern.parse(pattern), [0.5]), inputs


@pytest.mark.parametrize("pattern", ["column", "head_in:3"])
def test_refit_is_least_squares(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, inputs = random_problem(pattern)
    weight = problem.weights[0]
    pruned = weight * problem.pattern.keep(weight.abs(), 0.5)
    kept = (pruned != 0).any(dim=0)
    monkeypatch.setattr(refit, "_DAMPING", 1e-9)
    (fitted,) = refit.refine(problem, [pruned])
    assert torch.equal(fitted != 0, pruned != 0)
    inputs = inputs.double()
    best = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.double().T).solution.T
    torch.testing.assert_close(fitted[:, kept].double(), best, atol=1e-3, rtol=1e-3)
    assert layer_error(weight, fitted, problem.gram) < 0.9 * layer_error(
        weight, pruned, problem.gram
    )


def test_refit_changes_nothing_when_nothing_went_and_leaves_dead_inputs_alone() -> None:
    problem, _ = random_problem("column")
    (same,) = refit.refine(problem, [problem.weights[0].clone()])
    torch.testing.assert_close(same, problem.weights[0], atol=1e-6, rtol=0)
    problem.statistic[3] = problem.statistic[:, 3] = 0
    pruned = problem.weights[0].clone()
    pruned[:, :3] = 0
    (fitted,) = refit.refine(problem, [pruned])
    assert torch.equal(fitted[:, 3], pruned[:, 3])
    assert not fitted[:, :3].any()


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "taylor"])
@pytest.mark.parametrize("pattern", UNITS)
def test_refit_brings_the_model_nearer_to_the_dense_one(pattern: str, method: str) -> None:
    batches = tiny_batches("llama", count=8, length=32)
    errors = []
    for refine in (None, "refit"):
        model = tiny_model("llama")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4) if parameter.ndim > 1 else None
            wanted = model(**batches[0]).logits
            prune_(model, SparsityConfig(pattern, 0.5), method, batches, refine=refine)
            errors.append(float((model(**batches[0]).logits - wanted).square().mean()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "row", "block:4x1"])
def test_refit_refuses_other_patterns(pattern: str) -> None:
    config = SparsityConfig(pattern, None if pattern == "2:4" else 0.5)
    with pytest.raises(ValueError, match="refine='refit' fits whole columns"):
        prune_(tiny_model("llama"), config, "wanda", tiny_batches("llama"), refine="refit")


@pytest.mark.parametrize("family", ["bloom", "mixtral"])
@pytest.mark.parametrize("pattern", ["head", "column", "row"])
def test_unknown_families_need_targets(family: str, pattern: str) -> None:
    config = tiny_config(family)
    model = build(config, classes_of(config)[0])
    with pytest.raises(ValueError, match=r"is known of bert, albert, .*Name the layers"):
        prune_(model, SparsityConfig(pattern, 0.5), "magnitude")


def test_a_sparsity_that_leaves_nothing_is_refused() -> None:
    model = tiny_model("bert")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"all 4 units of .*'head_in:8'.*Wanted at most 0\.75"):
        prune_(model, SparsityConfig("head", 0.9), "magnitude")
    with pytest.raises(ValueError, match="cannot be divided"):
        prune_(model, SparsityConfig("head_in:5", 0.5), "magnitude")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_different_groups_in_different_blocks_are_told() -> None:
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=2, head_dim=4)
    with torch.no_grad():
        units = find_units(model)[0]
        units.out.weight[:, units.features(torch.tensor([0, 4]))] = 0
    shrink_(model)
    with pytest.raises(ValueError, match=r"serve \[3, 4\] heads of queries in different blocks"):
        prune_(model, SparsityConfig("head", 0.5), "magnitude")
    prune_(model, SparsityConfig("head_in:4", 0.3, targets="o_proj"), "magnitude")


def test_it_is_stored_in_blocks_and_comes_back(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    config = SparsityConfig("head", 0.5)
    prune_(model, config, "wanda", tiny_batches("gpt2"))
    hf_sparse.save_pretrained(model, tmp_path, config)
    assert "block" in hf_sparse.inspect_checkpoint(tmp_path).formats.values()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    assert hf_sparse.measure_sparsity(loaded, config).sparsity == 0.5
    assert {size.heads for size in shrink_(loaded).after} == {2}


def test_a_streamed_checkpoint_can_be_shrunk(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    config = SparsityConfig("column", 0.5)
    hf_sparse.prune_checkpoint(
        tmp_path / "dense",
        tmp_path / "sparse",
        config,
        "wanda",
        tiny_batches("llama"),
        refine="refit",
    )
    model = tiny_model("llama")
    prune_(model, config, "wanda", tiny_batches("llama"), refine="refit")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    shrink_(loaded)
    shrink_(model)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, atol=1e-6, rtol=1e-5)


@pytest.mark.few(3)
@pairwise("family, pattern, penalty", PARTS, UNITS, ["group_l2", "l0"])
def test_training_zeros_whole_units(family: str, pattern: str, penalty: str) -> None:
    model = tiny_model(family)
    config = SparsityConfig(pattern, 0.5)
    settings: dict[str, Any] = {"penalty": penalty, "lr": 1e-3}
    optimizer = hf_sparse.SparseAdamW(hf_sparse.sparse_param_groups(model, config), **settings)
    sparsifier = hf_sparse.Sparsifier(optimizer, config, 12, schedule=hf_sparse.Schedule("linear"))
    batches = tiny_batches(family)
    for step in range(12):
        model(**batches[step % 3])[0].float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
    sparsifier.check()
    model.eval()
    with torch.no_grad():
        wanted = model(**batches[0])[0]
        report = shrink_(model)
        torch.testing.assert_close(model(**batches[0])[0], wanted, atol=1e-5, rtol=1e-5)
    name = "heads" if pattern == "head" else "neurons"
    left = sum(getattr(size, name) for size in report.after)
    # All units of all blocks compete, and a block that lost all keeps one.
    assert left <= 0.5 * sum(getattr(size, name) for size in report.before) + 2 * len(report.names)


def test_trainer_trains_heads_away(tmp_path: Path) -> None:
    model = tiny_classifier()
    rows = [{"input_ids": torch.randint(2, 256, (8,)), "labels": n % 3} for n in range(16)]
    config = SparsityConfig("head", 0.5)
    args = TrainingArguments(
        str(tmp_path), max_steps=20, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=rows,
        optimizer_cls_and_kwargs=hf_sparse.trainer_optimizer(config, lr=1e-3),
        callbacks=[hf_sparse.SparsityCallback(config)],
    )
    trainer.train()
    assert hf_sparse.measure_sparsity(model, config).sparsity == 0.5
    assert sum(size.heads for size in shrink_(model).after) in (4, 5)


def test_every_family_is_described() -> None:
    assert list(PARTS) == list(PARTS)
