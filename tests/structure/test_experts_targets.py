"""Experts in 3-D parameters are targets like any matrix: names, orientation, routers, patterns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.patterns import Pattern
from hf_sparse.structure.experts import ExpertStack
from hf_sparse.structure.layers import block_layers, target_layers
from tests.support.mixtures import EXPERTS, MIXTURES, mixture_batches, separated, tiny_mixture


@pytest.mark.parametrize("family", MIXTURES)
def test_every_matrix_of_an_expert_is_a_target_in_its_own_name_and_orientation(family: str) -> None:
    model = tiny_mixture(family)
    found = {layer.name: layer for layer in target_layers(model)}
    wanted = {
        name: module.weight
        for name, module in separated(model).named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name].weight, wanted[name]) for name in wanted)
    assert f"model.layers.1.mlp.experts.down_proj.{EXPERTS - 1}" in found


@pytest.mark.parametrize("family", MIXTURES)
def test_what_is_written_to_an_expert_reaches_the_model(family: str) -> None:
    model = tiny_mixture(family)
    layer = next(item for item in block_layers(model) if item.name.endswith("down_proj.2"))
    layer.weight.fill_(0)
    stacked = model.model.layers[0].mlp.experts.down_proj
    assert [int((expert == 0).sum()) for expert in stacked] == [0, 0, stacked[0].numel(), 0]


@pytest.mark.parametrize(
    ("targets", "count"),
    [("experts.*", 16), ("gate_up_proj", 8), ("down_proj.3", 2), ("layers.0.mlp.experts.*", 8)],
)
def test_globs_name_experts_by_parameter_or_number(targets: str, count: int) -> None:
    config = SparsityConfig("2:4", targets=[targets])
    assert len(target_layers(tiny_mixture("mixtral"), config)) == count


def test_ignore_leaves_single_experts_out() -> None:
    model = tiny_mixture("mixtral")
    hf_sparse.prune_(model, SparsityConfig("2:4", ignore=["experts.*.0", "down_proj"]), "magnitude")
    experts = model.model.layers[0].mlp.experts
    assert [bool((expert == 0).any()) for expert in experts.gate_up_proj] == [
        False,
        True,
        True,
        True,
    ]
    assert not (experts.down_proj == 0).any()


def test_routers_are_targets_only_if_they_are_named() -> None:
    model = tiny_mixture("mixtral")
    block = model.model.layers[0].mlp
    block.gate = nn.Linear(32, EXPERTS, bias=False)
    names = [layer.name for layer in target_layers(model)]
    assert not any("gate" in name.split(".") for name in names)
    named = target_layers(model, SparsityConfig("unstructured", 0.5, targets=["gate"]))
    assert [layer.name for layer in named] == ["model.layers.0.mlp.gate"]


def test_experts_that_blocks_share_are_listed_and_counted_once() -> None:
    model = tiny_mixture("mixtral")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    names = [layer.name for layer in target_layers(model)]
    assert sum(".experts." in name for name in names) == 2 * EXPERTS
    assert not any(name.startswith("model.layers.1.mlp") for name in names)
    report = hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    assert len(report.tensors) == len(names)


def test_a_gate_that_routes_nothing_is_a_target() -> None:
    block = nn.ModuleDict({"gate": nn.Linear(4, 4), "up": nn.Linear(4, 4)})
    model = nn.Sequential(nn.ModuleList([block]))
    assert [layer.name for layer in target_layers(model)] == ["0.0.gate", "0.0.up"]


@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_tell_the_orientation_of_gated_experts_that_do_not(transposed: bool) -> None:
    module = nn.Module()
    shapes = ((4, 16, 12), (4, 6, 16)) if transposed else ((4, 12, 16), (4, 16, 6))
    module.gate_up_proj, module.down_proj = (nn.Parameter(torch.zeros(s)) for s in shapes)
    stack = ExpertStack.of(module)
    assert stack is not None
    assert (stack.turned == set(stack.parameters)) is transposed


def test_stacks_of_another_kind_are_left_out_and_counted_in_the_report() -> None:
    model = tiny_mixture("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.other = nn.Parameter(torch.zeros(2, 3, 4))
    report = hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    assert any(note.startswith("24 weights in the blocks are in stacks") for note in report.notes)


@pytest.mark.few(7)
@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize(
    "notation", ["unstructured", "2:4", "block:4x4", "row", "column", "head:8"]
)
def test_patterns_act_on_each_expert_by_itself(family: str, notation: str) -> None:
    model = tiny_mixture(family)
    pattern = Pattern.parse(notation)
    sparsity = None if notation == "2:4" else 0.5
    dense = {layer.name: layer.weight.clone() for layer in block_layers(model)}
    config = SparsityConfig(notation, sparsity, targets=["experts.*"])
    report = hf_sparse.prune_(model, config, "magnitude")
    for layer in target_layers(model, config):
        kept = pattern.keep(dense[layer.name].abs(), 0.5)
        assert torch.equal(layer.weight, dense[layer.name] * kept)
    assert report.violations == report.partial == 0
    assert report.sparsity == 0.5


def test_one_threshold_for_all_compares_experts_with_all_other_matrices() -> None:
    model, config = tiny_mixture("gpt_oss"), SparsityConfig("unstructured", 0.5)
    reference = separated(model)
    hf_sparse.prune_(model, config, "magnitude", scope="global")
    hf_sparse.prune_(reference, config, "magnitude", scope="global")
    wanted = {layer.name: layer.weight for layer in block_layers(reference)}
    assert all(torch.equal(layer.weight, wanted[layer.name]) for layer in block_layers(model))


def test_widths_that_a_pattern_cannot_divide_are_refused_before_anything_changes() -> None:
    model = tiny_mixture("qwen3_moe", moe_intermediate_size=22)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"experts.down_proj.0: .*divisible by M = 4"):
        hf_sparse.prune_(model, SparsityConfig("2:4"), "wanda", mixture_batches())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_experts_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = tiny_mixture("mixtral")
    with pytest.raises(ValueError, match="meta device"):
        hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
