"""Codes that come from files, and those that a config promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.formats import FormatError
from hf_sparse.quantization import Grid, OffGridError, rounded
from hf_sparse.runtime.model.coded_head import CodedHead
from hf_sparse.runtime.model.compiled import linears_of
from hf_sparse.runtime.model.single_layers import CompiledHead
from hf_sparse.structure.layers import PRUNED_WITH, target_layers
from tests.runtime.model.test_bits import MODELS, distance, model_for
from tests.support.closeness import same
from tests.support.compiled_families import inputs_of, model_of
from tests.support.compiled_folders import logits, unsigned


@pytest.mark.few(1)
@pytest.mark.parametrize("name", MODELS)
def test_files_hold_the_codes(name: str, tmp_path: Path) -> None:
    compiled = hf_sparse.compile(model_for(name, "2:4" if name == "llama" else ""), bits=4)
    loaded = hf_sparse.load_compiled(hf_sparse.save_compiled(compiled, tmp_path))
    assert same(logits(loaded), logits(compiled))
    assert isinstance(loaded.get_output_embeddings(), CodedHead)
    assert str(loaded.explain(1)).count("int4") == str(compiled.explain(1)).count("int4") > 0
    for one, other in zip(linears_of(loaded), linears_of(compiled), strict=True):
        assert one.shares
        assert one.codes.form == other.codes.form
        for stream, wanted in zip(one.codes.streams, other.codes.streams, strict=True):
            assert (stream == wanted).all()


def test_encoders_come_back_from_files(tmp_path: Path) -> None:
    compiled = hf_sparse.compile(model_of("roberta", sparsity=0.0), bits=8)
    loaded = hf_sparse.load_compiled(hf_sparse.save_compiled(compiled, tmp_path))
    given = inputs_of("roberta", 2, 21)
    with torch.no_grad():
        assert same(loaded(**given)[0], compiled(**given)[0])


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown format": ({"format": [8, 3, 4, 64]}, "none of the formats"),
    "half a format": ({"format": [8, 4]}, "its format is"),
    "another format": ({"format": [8, 4, 4, 64]}, "codes have the shape"),
    "rows without end": ({"rows": 1 << 40}, "codes have the shape"),
    "rows that are no number": ({"rows": 96.0}, "its format is"),
    "edges inside a block": ({"edges": [0, 40, 96]}, "parts|edges|columns"),
    "not shared": ({"shared": False}, "single tokens"),
    "no format": ({"format": None}, "its format is"),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_description_is_refused(name: str, tmp_path: Path) -> None:
    changes, message = CHANGES[name]
    hf_sparse.save_compiled(hf_sparse.compile(model_for("llama", "2:4"), bits=8), tmp_path)
    file = tmp_path / "compiled.json"
    described = unsigned(tmp_path)
    described["blocks"][1]["linears"]["qkv"] |= changes
    file.write_text(json.dumps(described))
    with pytest.raises(FormatError, match=message):
        hf_sparse.load_compiled(tmp_path)


@pytest.mark.parametrize("told", [[[8, 64, True], 1], [[3, 64, True], False], "int8", [8]])
def test_a_head_that_is_no_grid_is_refused(told: Any, tmp_path: Path) -> None:
    hf_sparse.save_compiled(hf_sparse.compile(model_for("gpt2"), bits=8), tmp_path)
    file = tmp_path / "compiled.json"
    file.write_text(json.dumps(unsigned(tmp_path) | {"head": told}))
    with pytest.raises(FormatError):
        hf_sparse.load_compiled(tmp_path)


def on_grid(model: Any, grid: Grid, **more: Any) -> Any:
    """A model whose targets lie on a grid, as its config promises."""
    config = SparsityConfig(
        "2:4", bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric, **more
    )
    with torch.no_grad():
        for layer in target_layers(model, config):
            layer.weight.copy_(rounded(layer.weight, grid))
        if config.embedding_bits:
            head = model.get_output_embeddings().weight
            head.copy_(rounded(head, Grid(config.embedding_bits, grid.group_size)))
    vars(model)[PRUNED_WITH] = config
    return model


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "grid", [Grid(8, 32), Grid(4, 32), Grid(8), Grid(4, 32, symmetric=False)], ids=str
)
def test_codes_that_a_config_promises_are_used_as_they_are(grid: Grid) -> None:
    model = on_grid(model_for("llama", "2:4"), grid)
    compiled = hf_sparse.compile(model)
    bits = 4 if grid.bits == 4 and grid.symmetric else 8
    assert {linear.codes.form.bits for linear in linears_of(compiled)} == {bits}
    found, wanted = logits(compiled), logits(model)
    assert distance(found, wanted) < 0.1
    assert isinstance(compiled.lm_head, CompiledHead)
    assert not isinstance(compiled.lm_head, CodedHead)  # nothing promises its bits
    assert isinstance(hf_sparse.compile(model, bits=grid.bits).lm_head, CodedHead)


def test_a_promise_of_embeddings_and_of_some_layers_is_used(tmp_path: Path) -> None:
    grid = Grid(8, 32)
    model = on_grid(model_for("llama", "2:4"), grid, embedding_bits=8, ignore=("up_proj",))
    compiled = hf_sparse.compile(model)
    coded = {linear.name: linear.codes is not None for linear in linears_of(compiled)}
    assert all(is_coded == ("up_proj" not in name) for name, is_coded in coded.items())
    head = compiled.lm_head
    assert isinstance(head, CodedHead)
    assert head.coding.exact
    found, wanted = logits(compiled), logits(model)
    assert distance(found, wanted) < 0.1
    loaded = hf_sparse.load_compiled(hf_sparse.save_compiled(compiled, tmp_path))
    assert same(logits(loaded), found)
    assert loaded.lm_head.coding == head.coding


def test_weights_that_left_their_grid_are_refused() -> None:
    model = on_grid(model_for("llama", "2:4"), Grid(8, 32))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.0123
    with pytest.raises(OffGridError, match=r"layers\.1\.mlp\.up_proj: 32 of .* not on the grid"):
        hf_sparse.compile(model)


def test_other_bits_than_those_that_are_there_are_refused() -> None:
    model = on_grid(model_for("llama", "2:4"), Grid(8, 32))
    with pytest.raises(ValueError, match="have 8 already"):
        hf_sparse.compile(model, bits=4)
