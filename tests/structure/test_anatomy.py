"""Units of families that are known by what their blocks are made of: what goes leaves no trace."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import hf_sparse
from hf_sparse import SparsityConfig, prune_, shrink_
from hf_sparse.structure.anatomy import FAMILIES
from hf_sparse.structure.parts import PARTS
from hf_sparse.structure.units import clear_unused_, find_units
from tests.support.any_models import build, classes_of, dummy_inputs, outputs_of, tiny_config
from tests.support.processes import run

FAST = ("bart", "gptj", "modernbert", "phi3", "roberta", "starcoder2", "t5")
# Those whose configs tell the size of a head beside the number of heads, and that use it.
WITH_HEADS = {
    *(
        "arcee",
        "cohere",
        "cohere2",
        "deit",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
    ),
    *("glm", "glm4", "granite", "olmo", "phi", "phi3", "seed_oss", "smollm3", "starcoder2", "vit"),
}
# Why no head of these can go.
FIXED = {
    **dict.fromkeys(("bart", "marian", "mbart", "pegasus"), "has a second attention"),
    **dict.fromkeys(("t5", "mt5"), "relative_attention_bias.weight belongs to all heads"),
    **dict.fromkeys(("olmo2", "olmo3"), "q_norm.weight belongs to all heads"),
    "deberta": "q_bias belongs to all heads",
}


def some(types: tuple[str, ...]) -> list[Any]:
    return [
        model_type if model_type in FAST else pytest.param(model_type, marks=pytest.mark.slow)
        for model_type in types
    ]


def model_of(model_type: str) -> Any:
    """A model whose units all matter to its outputs."""
    config = tiny_config(model_type)
    model = build(config, classes_of(config)[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else None
    return model


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert [each.shape for each in found] == [each.shape for each in wanted]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def check_shrinks(model: Any, pattern: str, folder: Path) -> None:
    """Half of the units are pruned and removed, and transformers alone loads what is left."""
    kind, inputs = type(model), next(dummy_inputs(model))
    prune_(model, SparsityConfig(pattern, 0.5, uniform=True), "magnitude")
    [before], wanted = {units.size for units in find_units(model)}, outputs_of(model, inputs)
    report = shrink_(model)
    assert (report.plain, report.uniform) == (True, True)
    [after] = {units.size for units in find_units(model)}
    halved = vars(before)["heads" if pattern == "head" else "neurons"] // 2
    assert vars(after)["heads" if pattern == "head" else "neurons"] == halved
    assert_close(outputs_of(model, inputs), wanted)
    hf_sparse.save_pretrained(model, folder)
    loaded, told = kind.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(told.values()), told
    assert loaded.config.model_type == model.config.model_type
    assert loaded.num_parameters() == model.num_parameters()
    assert_close(outputs_of(loaded.eval(), inputs), wanted)


@pytest.mark.few(1)
@pytest.mark.parametrize("model_type", some(FAMILIES))
def test_neurons_go_without_a_trace(model_type: str, tmp_path: Path) -> None:
    check_shrinks(model_of(model_type), "column", tmp_path)


@pytest.mark.few(3)
@pytest.mark.parametrize("model_type", some(FAMILIES))
def test_heads_go_without_a_trace_or_are_refused(model_type: str, tmp_path: Path) -> None:
    model = model_of(model_type)
    if model_type in WITH_HEADS:
        check_shrinks(model, "head", tmp_path)
        return
    before = copy.deepcopy(model.state_dict())
    message = FIXED.get(model_type, "cannot be told by a config of type .* the nearest is 4")
    with pytest.raises(ValueError, match=message):
        prune_(model, SparsityConfig("head", 0.5, uniform=True), "magnitude")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("model_type", ["gpt_neox", "phi3", "modernbert"])
def test_the_rows_of_a_head_in_one_projection_for_all(model_type: str) -> None:
    model = model_of(model_type)
    blocks = find_units(model)
    with torch.no_grad():
        for units in blocks:
            units.out.weight[:, : 2 * units.head_dim] = 0  # of phi3 a whole group
    inputs = next(dummy_inputs(model))
    wanted = outputs_of(model, inputs)
    clear_unused_(blocks)
    assert_close(outputs_of(model, inputs), wanted)
    for units in blocks:
        [fused] = units.projections
        zero = int((fused.weight == 0).all(dim=1).sum())
        assert zero == (2 * 3 if units.size.key_heads == 4 else 2 + 1 + 1) * units.head_dim


def test_blocks_of_these_families_always_get_one_size() -> None:
    model = model_of("roberta")
    with torch.no_grad():
        for units, count in zip(find_units(model), (10, 20), strict=True):
            units.down.weight[:, :count] = 0
    report = shrink_(model)
    assert [size.neurons for size in report.after] == [54, 54]
    assert any("10 neurons are zero and stay" in note for note in report.notes)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Known families: bert, .*roberta"):
        find_units(model_of("mixtral"))
    with pytest.raises(ValueError, match="half of a neuron of Phi3Model"):
        prune_(model_of("phi3"), SparsityConfig("row", 0.5, uniform=True), "magnitude")
    model = model_of("roberta")
    model.encoder.layer[1].intermediate.dense = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"encoder\.layer\.1 is no feed-forward network"):
        find_units(model)


def test_many_families_are_known_each_in_one_table() -> None:
    assert len(FAMILIES) + len(PARTS) >= 25
    assert not set(FAMILIES) & set(PARTS)
    assert WITH_HEADS | set(FIXED) <= set(FAMILIES)


@pytest.mark.slow
def test_transformers_alone_loads_what_is_left(tmp_path: Path) -> None:
    ids = torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    folders = []
    for model_type, pattern in (("roberta", "column"), ("phi3", "head"), ("gpt_neox", "column")):
        model, folder = model_of(model_type), tmp_path / model_type
        prune_(model, SparsityConfig(pattern, 0.5, uniform=True), "magnitude")
        shrink_(model)
        hf_sparse.save_pretrained(model, folder)
        with torch.no_grad():
            expected = {"input_ids": ids, "output": model(input_ids=ids)[0]}
        save_file(expected, folder.with_suffix(".safetensors"))
        folders.append(folder)
    done = run("load_plain_models", *folders)
    assert done.returncode == 0, done.stderr
    for folder, line in zip(folders, done.stdout.splitlines(), strict=True):
        answer = json.loads(line)
        assert (answer["type"], answer["errors"]) == (folder.name, 0)
        assert answer["difference"] < 1e-4
