"""Experts in 3-D parameters are stored as one compressed tensor, and come back bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import FormatError, SparsityConfig
from hf_sparse.formats import FORMATS, compress, decompress, num_bytes, read_layout
from hf_sparse.patterns import Pattern
from tests.support.closeness import same
from tests.support.mixtures import EXPERTS, MIXTURES, tiny_mixture

HELD = {"bitmask": "unstructured", "gap4": "unstructured", "gap8": "unstructured", "nm": "2:4"}
HELD |= {"block": "block:2x4", "dense": "2:4", "auto": "2:4", "rice": "unstructured"}
KEPT_BY = ("bitmask", "gap4", "gap8", "nm", "block")


def stack_of(pattern: str, *, transposed: bool, matrices: int = 3) -> torch.Tensor:
    """A stack of sparse matrices of 8 x 12, `(out_features, in_features)` if not transposed."""
    weights = torch.randn(matrices, 8, 12, generator=torch.Generator().manual_seed(0))
    kept = [Pattern.parse(pattern).keep(weight.abs(), 0.5) for weight in weights]
    weights *= torch.stack(kept)
    return weights.mT.contiguous() if transposed else weights


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_stack_comes_back_bit_for_bit(format: str, transposed: bool) -> None:
    pattern = HELD[format]
    weight = stack_of(pattern, transposed=transposed)
    parts = compress(weight, format, Pattern.parse(pattern), transposed=transposed)
    if format == "dense":
        assert torch.equal(parts[""], weight)
        return
    layout = read_layout(parts)
    assert layout.shape == weight.shape
    assert layout.matrices == 3
    assert torch.equal(decompress(parts), weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("notation", ["row", "column", "head:4", "block:4x3"])
def test_groups_end_where_a_matrix_ends(notation: str, transposed: bool) -> None:
    weight = stack_of(notation, transposed=transposed)
    pattern = Pattern.parse(notation)
    parts = compress(weight, "block", pattern, transposed=transposed)
    assert read_layout(parts).parameters == pattern.group_shape(8, 12)
    assert parts[""].numel() == weight.numel() // 2
    assert torch.equal(decompress(parts), weight)


@pytest.mark.parametrize("format", KEPT_BY)
def test_a_stack_has_the_bytes_of_its_matrices_one_below_the_other(format: str) -> None:
    pattern = Pattern.parse(HELD[format])
    weight = stack_of(HELD[format], transposed=False)
    stacked, flat = (compress(w, format, pattern) for w in (weight, weight.reshape(-1, 12)))
    assert torch.equal(stacked[""], flat[""])
    assert torch.equal(stacked[format], flat[format])
    assert stacked["layout"].tolist() == [8, 12, *flat["layout"].tolist()[2:], 3]
    assert num_bytes(stacked) == num_bytes(flat) + 8


@pytest.mark.parametrize("matrices", [-1, 0, 2, 4, 2**31])
@pytest.mark.parametrize("format", KEPT_BY)
def test_a_stack_of_another_number_of_matrices_is_refused(format: str, matrices: int) -> None:
    pattern = Pattern.parse(HELD[format])
    parts = compress(stack_of(HELD[format], transposed=False), format, pattern)
    parts["layout"][-1] = matrices
    if format in ("gap4", "gap8") and matrices == 4:  # behind the last weight are zeros
        assert decompress(parts).shape == (4, 8, 12)
        return
    with pytest.raises(FormatError):
        decompress(parts)


def test_blocks_that_cross_matrices_are_refused() -> None:
    parts = compress(torch.eye(6).reshape(2, 3, 6), "block", Pattern.parse("block:3x2"))
    parts["layout"] = torch.tensor([3, 6, 0, 2, 3, 2])
    with pytest.raises(FormatError, match="no layout of 'block'"):
        decompress(parts)


@pytest.mark.few(2)
@pytest.mark.parametrize("notation", ["2:4", "unstructured", "block:4x4"])
@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_come_back_bit_for_bit(family: str, notation: str, tmp_path: Path) -> None:
    model = tiny_mixture(family)
    config = SparsityConfig(notation, None if notation == "2:4" else 0.7)
    hf_sparse.prune_(model, config, "magnitude")
    hf_sparse.save_pretrained(model, tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    ids = torch.arange(2, 20)[None]
    assert same(back(input_ids=ids).logits, model(input_ids=ids).logits)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.0.mlp.experts.down_proj.layout"][-1] == EXPERTS
    inspected = hf_sparse.inspect_checkpoint(tmp_path)
    assert set(inspected.report.tensors) == set(hf_sparse.measure_sparsity(model, config).tensors)
    assert sum(".experts." in count.name for count in inspected.report.tensors) == 4 * EXPERTS


def test_mixtures_are_saved_dense_under_the_names_of_their_family(tmp_path: Path) -> None:
    model = tiny_mixture("mixtral")
    hf_sparse.prune_(model, SparsityConfig("2:4", format="dense"), "magnitude")
    hf_sparse.save_pretrained(model, tmp_path)
    assert any(".experts.3.w2.weight" in name for name in load_file(tmp_path / "model.safetensors"))
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_stack_of_which_some_experts_stay_dense_comes_back(tmp_path: Path) -> None:
    model = tiny_mixture("gpt_oss")
    config = SparsityConfig("2:4", ignore=["experts.*.0"])
    hf_sparse.prune_(model, config, "magnitude")
    hf_sparse.save_pretrained(model, tmp_path)
    assert hf_sparse.inspect_checkpoint(tmp_path).report.sparsity == 0.5
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert hf_sparse.measure_sparsity(back, config).violations == 0


def test_an_expert_that_breaks_the_promise_is_named_when_saving(tmp_path: Path) -> None:
    model = tiny_mixture("mixtral")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] = 1.0
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj.2: .* promises"):
        hf_sparse.save_pretrained(model, tmp_path, config=SparsityConfig("2:4"))


def test_an_expert_that_breaks_the_promise_is_refused_when_loading(tmp_path: Path) -> None:
    model = tiny_mixture("mixtral")
    hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5), "magnitude")
    hf_sparse.save_pretrained(model, tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"unstructured"', '"2:4"'))
    with pytest.raises(FormatError, match="promises pattern '2:4'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_experts_that_are_turned_the_other_way_are_refused(tmp_path: Path) -> None:
    model = tiny_mixture("gpt_oss", hidden_size=32, intermediate_size=32)
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    hf_sparse.save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj.layout"][2] = 0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match="transposed=0, its layer wants 1"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_example_of_the_specification_is_what_is_written() -> None:
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    section = text.partition("A **stack of matrices**")[2].partition("## ")[0]
    shown, wanted = re.findall(r"^```text\n(.*?)^```", section, re.M | re.S)
    rows = torch.tensor([[float(number) for number in line.split()] for line in shown.splitlines()])
    parts = compress(torch.stack(rows.split(4, dim=1)), "bitmask")
    lines = dict(line.split(None, 1) for line in wanted.splitlines())
    assert " ".join(map(str, parts["layout"].tolist())) == lines["layout"]
    assert " ".join(f"{value:g}" for value in parts[""].tolist()) == lines["values"]
    assert bytes(parts["bitmask"].tolist()).hex(" ") == lines["bitmask"]
