"""Compiled models of 8 and 4 bits: against rounded models in torch, from files, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.formats import FormatError
from hf_sparse.quantization import Grid, OffGridError, rounded
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.model.coded_head import CodedHead
from hf_sparse.runtime.model.compiled import linears_of, stack_of
from hf_sparse.runtime.model.single_layers import CompiledHead
from hf_sparse.runtime.programs import row_steps
from hf_sparse.runtime.programs.step import Multiply, Quantise
from hf_sparse.structure.layers import PRUNED_WITH, target_layers
from tests.support.closeness import same
from tests.support.compiled_families import DECODERS, ENCODERS, inputs_of, model_of
from tests.support.compiled_folders import DECODER, logits
from tests.support.rounded_models import rounded_model
from tests.support.sparse_models import random_model

TARGETS = list(target.targets())
MODELS: dict[str, Any] = {
    # Biases, and 50 neurons: no whole groups and blocks.
    "gpt2": GPT2Config(n_embd=32, n_inner=50, n_layer=2, n_head=4, n_positions=64, **DECODER),
    # Two chunks of neurons, groups of keys, a gate.
    "llama": LlamaConfig(
        hidden_size=96,
        intermediate_size=800,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **DECODER,
    ),
}


def model_for(name: str, zeros: str = "") -> Any:
    model = random_model(MODELS[name], 0.0)
    if zeros:
        hf_sparse.prune_(model, SparsityConfig(zeros), "magnitude")
    return model


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_is_the_rounded_one(name: str, bits: int) -> None:
    model = model_for(name)
    compiled = hf_sparse.compile(model, bits=bits)
    wanted, found = logits(rounded_model(model, bits)), logits(compiled)
    prompt, token = slice(0, 9), slice(9, None)
    torch.testing.assert_close(found[:, prompt], wanted[:, prompt], atol=1e-4, rtol=1e-4)
    # Here and there a feature is so near to a half that it is rounded to the other side.
    assert distance(found[:, token], wanted[:, token]) < 5e-3
    assert distance(found[:, token], logits(model)[:, token]) < (0.1 if bits == 8 else 0.6)
    assert {linear.codes.form.bits for linear in linears_of(compiled)} == {bits}


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_gives_the_same(name: str) -> None:
    if TARGETS.index(name) < TARGETS.index(target.host().name):
        pytest.skip(f"this CPU cannot run {name}")
    model = model_for("llama", "2:4")
    wanted = logits(hf_sparse.compile(model, bits=4))
    found = logits(hf_sparse.compile(model, bits=4, target=name))
    assert distance(found, wanted) < 5e-3


@pytest.mark.parametrize(
    ("zeros", "pattern"), [("2:4", "2 of 4"), ("4:8", "8 of 16"), ("4:16", "4 of 16")]
)
def test_zeros_of_a_pattern_are_read_by_its_kernel(zeros: str, pattern: str) -> None:
    model = model_for("llama", zeros)
    compiled = hf_sparse.compile(model, bits=8)
    if zeros == "4:8" and target.host().has.expand:
        pattern = "mask"  # fewer bytes than the places
    if target.host().name in ("avx512", "avx2"):
        assert {linear.codes.form.pattern for linear in linears_of(compiled)} == {pattern}
        assert f"int8 {pattern}" in str(compiled.explain(1))
    assert distance(logits(compiled), logits(model)) < 0.05
    dense = hf_sparse.compile(model)
    sizes = [sum(linear.nbytes for linear in linears_of(one)) for one in (compiled, dense)]
    assert sizes[0] < sizes[1] / 4


def test_zeros_of_no_pattern_are_read_by_masks_where_they_can_be_expanded(tmp_path: Path) -> None:
    model = random_model(MODELS["llama"], 0.6)
    compiled = hf_sparse.compile(model, bits=8)
    found = {linear.codes.form.pattern for linear in linears_of(compiled)}
    assert found == ({"mask"} if target.host().has.expand else {"dense"})
    assert distance(logits(compiled)[:, :9], logits(rounded_model(model, 8))[:, :9]) < 1e-4
    assert distance(logits(compiled), logits(model)) < 0.05
    hf_sparse.save_compiled(compiled, tmp_path)
    for name in TARGETS[TARGETS.index(target.host().name) :]:  # files are the same for all
        assert (
            distance(logits(hf_sparse.load_compiled(tmp_path, target=name)), logits(compiled))
            < 5e-3
        )


def test_features_are_rounded_once_for_all_that_read_them() -> None:
    stack = stack_of(hf_sparse.compile(model_for("llama"), bits=8))
    steps = [step for _, step in row_steps.numbered_steps(stack)]
    made = [step for step in steps if isinstance(step, Quantise)]
    # Of what attention, its output, the perceptron and its output read.
    assert len(made) == 4 * len(stack.blocks)
    read = {step.x for step in steps if isinstance(step, Multiply)}
    assert read == {step.y for step in made}


@pytest.mark.parametrize("batch", [1, 3])
def test_generation_is_that_of_the_rounded_model(batch: int) -> None:
    model = model_for("llama")
    compiled, reference = hf_sparse.compile(model, bits=8), rounded_model(model, 8)
    ids = torch.arange(5 * batch).view(batch, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found, wanted = (one.generate(ids, **options) for one in (compiled, reference))
    assert torch.equal(found, wanted)


FAST = ("mixtral", "gemma2", "gpt_neox", "phi3")


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in DECODERS],
)
def test_every_decoder_is_near_to_itself(family: str) -> None:
    model = model_of(family, AutoModelForCausalLM, sparsity=0.0)
    compiled = hf_sparse.compile(model, bits=8)
    ids = inputs_of(family, 2, 9)["input_ids"]
    with torch.no_grad():
        parts = []
        first = compiled(ids[:, :8], use_cache=True)
        parts = [first.logits, compiled(ids[:, 8:], past_key_values=first.past_key_values).logits]
        wanted = model(ids).logits
    assert distance(torch.cat(parts, dim=1), wanted) < 0.1
    assert all(
        linear.codes is not None for linear in linears_of(compiled) if "gate" not in linear.name
    )


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name == "roberta" else pytest.mark.slow) for name in ENCODERS],
)
def test_encoders_keep_codes_and_compute_with_floats(family: str) -> None:
    model = model_of(family, sparsity=0.0)
    compiled = hf_sparse.compile(model, bits=8)
    given = inputs_of(family, 2, 21)
    with torch.no_grad():
        assert distance(compiled(**given)[0], model(**given)[0]) < 0.05
    assert all(
        linear.single is None and linear.codes is not None for linear in linears_of(compiled)
    )


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


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_description_is_refused(name: str, tmp_path: Path) -> None:
    changes, message = CHANGES[name]
    hf_sparse.save_compiled(hf_sparse.compile(model_for("llama", "2:4"), bits=8), tmp_path)
    file = tmp_path / "compiled.json"
    described = json.loads(file.read_text())
    described["blocks"][1]["linears"]["qkv"] |= changes
    file.write_text(json.dumps(described))
    with pytest.raises(FormatError, match=message):
        hf_sparse.load_compiled(tmp_path)


@pytest.mark.parametrize("told", [[[8, 64, True], 1], [[3, 64, True], False], "int8", [8]])
def test_a_head_that_is_no_grid_is_refused(told: Any, tmp_path: Path) -> None:
    hf_sparse.save_compiled(hf_sparse.compile(model_for("gpt2"), bits=8), tmp_path)
    file = tmp_path / "compiled.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"head": told}))
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


@pytest.mark.parametrize(
    "grid", [Grid(8, 32), Grid(4, 32), Grid(8), Grid(4, 32, symmetric=False)], ids=str
)
def test_codes_that_a_config_promises_are_used_as_they_are(grid: Grid) -> None:
    model = on_grid(model_for("llama", "2:4"), grid)
    compiled = hf_sparse.compile(model)
    bits = 4 if grid.bits == 4 and grid.symmetric else 8
    assert {linear.codes.form.bits for linear in linears_of(compiled)} == {bits}
    found, wanted = logits(compiled), logits(model)
    torch.testing.assert_close(found[:, :9], wanted[:, :9], atol=1e-4, rtol=1e-4)
    assert distance(found[:, 9:], wanted[:, 9:]) < 0.1
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
    torch.testing.assert_close(found[:, :9], wanted[:, :9], atol=1e-4, rtol=1e-4)
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


@pytest.mark.parametrize("bits", [3, 16, 0])
def test_other_bits_than_8_and_4_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}; wanted 8 or 4"):
        hf_sparse.compile(model_for("gpt2"), bits=bits)


def test_bits_of_what_is_not_compiled_as_a_whole_are_refused() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=32, **sizes))
    with pytest.raises(ValueError, match=r"bits is 8, and .* is not compiled as a whole"):
        hf_sparse.compile(model, bits=8)


def test_a_head_of_any_size_has_eight_bits() -> None:
    config = copy.deepcopy(MODELS["gpt2"])
    config.vocab_size = 37
    model = random_model(config, 0.0)
    compiled = hf_sparse.compile(model, bits=8)
    assert isinstance(compiled.lm_head, CodedHead)
    assert compiled.lm_head.weight is compiled.transformer.wte.weight
    x = torch.randn(2, 1, 32)
    with torch.no_grad():
        found, wanted = compiled.lm_head(x), model.lm_head(x)
    assert found.shape == (2, 1, 37)
    assert distance(found, wanted) < 0.02
    many = torch.randn(2, 9, 32)
    with torch.no_grad():
        assert same(compiled.lm_head(many), model.lm_head(many))


def test_a_head_whose_weight_is_changed_multiplies_with_the_new_one() -> None:
    model = model_for("llama")
    compiled = hf_sparse.compile(model, bits=8)
    twin = copy.deepcopy(compiled)
    x = torch.randn(1, 1, 96)
    with torch.no_grad():
        assert same(twin.lm_head(x), compiled.lm_head(x))
        compiled.lm_head.weight[3] = 5.0
        assert same(compiled.lm_head(x), model.lm_head(x))
        assert same(copy.deepcopy(compiled).lm_head(x), model.lm_head(x))
        compiled.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        assert not compiled.lm_head(x).any()


def test_nan_stays_in_its_sequence() -> None:
    compiled = hf_sparse.compile(model_for("llama", "2:4"), bits=8)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        compiled.get_input_embeddings().weight[30] = torch.nan
        first = compiled(input_ids=ids, use_cache=True)
        token = torch.tensor([[30], [3]])
        both = compiled(input_ids=token, past_key_values=first.past_key_values).logits
        alone = compiled(input_ids=ids[1:], use_cache=True)
        one = compiled(input_ids=token[1:], past_key_values=alone.past_key_values).logits
    assert both[0].isnan().all()
    torch.testing.assert_close(both[1:], one)


def test_one_copy_of_a_weight_serves_both_kinds_of_kernels() -> None:
    model = model_for("llama")
    compiled = hf_sparse.compile(model, bits=8)
    weights = sum(layer.weight.numel() for layer in target_layers(model))
    packed = sum(linear.nbytes for linear in linears_of(compiled))
    assert packed < 1.4 * weights  # rows and columns of whole groups and blocks
