"""Encoders with decoders, compiled as two stacks, against transformers: heads, padding, generation."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartForCausalLM,
    PreTrainedModel,
    T5EncoderModel,
)

import hf_sparse
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.model.compiled import CompiledLayer, stack_of, stacks_of
from hf_sparse.runtime.model.pairs import PAIRS
from hf_sparse.runtime.programs import row_steps
from hf_sparse.upstream.transformers.caches import cache_name
from tests.support.closeness import same
from tests.support.compiled_families import tensors_of
from tests.support.compiled_folders import in_a_child
from tests.support.compiled_models import compiled_for
from tests.support.guarded_memory import guard_the_runtime
from tests.support.pairs import CONFIGS, ids_of, inputs_of, pair_of

TOLERANCE = {"atol": 3e-5, "rtol": 1e-4}
# Between them they have every kind of part; the others have the same in other modules.
VARIED = ("bart", "mbart", "t5", "umt5")
GENERATED = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}


def some(names: Any, fast: Any) -> list[Any]:
    """All values, of which the fast suite takes those that are told."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@functools.cache
def pair(family: str, auto: Any = AutoModelForSeq2SeqLM) -> tuple[PreTrainedModel, PreTrainedModel]:
    model = pair_of(family, auto)
    return model, hf_sparse.compile(model)


def test_every_family_is_tried() -> None:
    assert set(CONFIGS) == set(PAIRS)


@pytest.mark.few(1)
@pytest.mark.parametrize("family", some(CONFIGS, ("bart", "umt5")))
def test_hidden_states_of_both_stacks(family: str) -> None:
    model, compiled = pair(family)
    assert type(compiled) is type(model)
    assert compiled.explain(tokens=1).reason is None
    for tokens, decoded in ((1, 1), (90, 5), (7, 70)):
        given = inputs_of(2, tokens, decoded)
        with torch.no_grad():
            wanted = model(**given, output_hidden_states=True)
            plain = compiled(**given)
            # As when teachers force: without a cache.
            found = compiled(**given, output_hidden_states=True, use_cache=False)
        for name, mask in (("encoder", "attention_mask"), ("decoder", "decoder_attention_mask")):
            seen = given[mask].bool()
            states, references = found[f"{name}_hidden_states"], wanted[f"{name}_hidden_states"]
            assert len(states) == len(references) == 3 + (name == "encoder")
            for state, reference in zip(states, references, strict=True):
                torch.testing.assert_close(state[seen], reference[seen], **TOLERANCE)
        torch.testing.assert_close(plain.logits[seen], wanted.logits[seen], **TOLERANCE)


# What else is made of the families' stacks, some of it of one of them.
HEADS: dict[str, tuple[str, Any]] = {
    "base": ("bart", AutoModel),
    "sequence": ("bart", AutoModelForSequenceClassification),
    "question": ("bart", AutoModelForQuestionAnswering),
    "causal": ("bart", AutoModelForCausalLM),
    "t5 sequence": ("t5", AutoModelForSequenceClassification),
    "t5 question": ("t5", AutoModelForQuestionAnswering),
    "t5 tokens": ("t5", AutoModelForTokenClassification),
    "t5 encoder": ("t5", T5EncoderModel),
    "umt5 tokens": ("umt5", AutoModelForTokenClassification),
    "mbart causal": ("mbart", AutoModelForCausalLM),
    "marian causal": ("marian", AutoModelForCausalLM),
}


@pytest.mark.parametrize("padding", some(["right", "left"], ["right"]))
@pytest.mark.parametrize("head", some(HEADS, ("causal", "t5 tokens")))
def test_every_head(head: str, padding: str) -> None:
    family, auto = HEADS[head]
    model, compiled = pair(family, auto)
    alone = head.endswith(("causal", "tokens", "encoder"))
    assert len(stacks_of(compiled)) == (1 if alone else 2)
    ids, mask = ids_of(2, 21, **{padding: 4})
    ids[:, -1] = ids[:, 3] = 2  # sequences are classified by what is at their ends
    with torch.no_grad():
        outputs = (one(input_ids=ids, attention_mask=mask) for one in (model, compiled))
        wanted, found = (list(tensors_of(output)) for output in outputs)
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        if one.shape[:2] == mask.shape:  # what padding gives may be anything
            one, other = one[mask.bool()], other[mask.bool()]
        if one.shape[-2:-1] != (21,):  # else keys in a cache
            torch.testing.assert_close(one, other, **TOLERANCE)
    assert compiled.explain(tokens=1).reason is None
    assert type(compiled) is type(model)


OPTIONS: list[dict[str, Any]] = [
    {"num_beams": 3, "num_return_sequences": 2},
    {},
    {"use_cache": False},
    {"do_sample": True},
    {"num_beams": 2, "do_sample": True},
]


@pytest.mark.parametrize("options", some(OPTIONS, OPTIONS[:1]), ids=str)
@pytest.mark.parametrize("padding", some(["left", "right"], ["left"]))
@pytest.mark.parametrize("family", some(CONFIGS, ("bart", "umt5")))
def test_generate(family: str, padding: str, options: dict[str, Any]) -> None:
    ids, mask = ids_of(3, 19, **{padding: 5})
    found = []
    for one in pair(family):
        torch.manual_seed(3)
        found.append(one.generate(ids, attention_mask=mask, **{**GENERATED, **options}))
    assert torch.equal(*found)


@pytest.mark.parametrize("family", some(CONFIGS, ("bart", "umt5")))
def test_a_cache_goes_on_from_any_position(family: str) -> None:
    """Several tokens at a time, and single ones by rows, on more threads than one."""
    model, compiled = pair(family)
    assert row_steps.fits(stack_of(compiled))
    given = inputs_of(2, 40, 84)
    ids, mask = given["decoder_input_ids"], given["decoder_attention_mask"]
    torch.set_num_threads(2)
    with torch.no_grad():
        wanted = model(**given).logits
        encoded = compiled.get_encoder()(given["input_ids"], given["attention_mask"])
        parts, cache, done, name = [], None, 0, cache_name(model.forward)
        for part in ids.split((3, 1, 1, 70, 1, 8), 1):
            done += part.shape[1]
            output = compiled(
                encoder_outputs=encoded,
                attention_mask=given["attention_mask"],
                decoder_input_ids=part,
                decoder_attention_mask=mask[:, :done],
                use_cache=True,
                **{name: cache},
            )
            cache = output[name]
            parts.append(output.logits)
    torch.testing.assert_close(
        torch.cat(parts, dim=1)[mask.bool()], wanted[mask.bool()], **TOLERANCE
    )


@pytest.mark.parametrize("family", some(VARIED, ("bart",)))
def test_a_cache_that_the_model_filled_is_taken_over(family: str) -> None:
    model, compiled = pair(family)
    given = inputs_of(2, 23, 9)
    ids = given.pop("decoder_input_ids")
    given.pop("decoder_attention_mask")
    with torch.no_grad():
        wanted = model(**given, decoder_input_ids=ids).logits[:, 6:]
        name = cache_name(model.forward)
        cache = model(**given, decoder_input_ids=ids[:, :6], use_cache=True)[name]
        found = compiled(**given, decoder_input_ids=ids[:, 6:], **{name: cache}).logits
    torch.testing.assert_close(found, wanted, **TOLERANCE)


@pytest.mark.parametrize("bits", some([8, 4], [4]))
@pytest.mark.parametrize("family", some(VARIED, ("t5",)))
def test_bits(family: str, bits: int) -> None:
    """All weights of both stacks are codes; many tokens and single ones agree."""
    model = pair_of(family, sparsity=0.5)
    compiled = hf_sparse.compile(model, bits=bits)
    stacks = stacks_of(compiled)
    assert all(linear.codes is not None for stack in stacks for linear in stack.linears)
    given = inputs_of(2, 30, 9)
    seen = given["decoder_attention_mask"].bool()
    with torch.no_grad():
        wanted, found = (one(**given).logits[seen] for one in (model, compiled))
    error = float((found - wanted).norm() / wanted.norm())
    assert 1e-5 < error < {8: 0.05, 4: 0.5}[bits]
    ids, mask = given["input_ids"], given["attention_mask"]
    options = {**GENERATED, "output_logits": True, "return_dict_in_generate": True}
    rows, tiles = (
        compiled.generate(ids, attention_mask=mask, use_cache=cached, **options).logits[1]
        for cached in (True, False)
    )
    # One rounds what is multiplied for each token, the other for a tile.
    assert float((rows - tiles).norm() / tiles.norm()) < 0.05


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", some(CONFIGS, ()))
def test_two_byte_models(family: str, kind: torch.dtype) -> None:
    model = pair_of(family).to(kind)
    compiled = hf_sparse.compile(model)
    assert {stack.weight_type.dtype for stack in stacks_of(compiled)} == {kind}
    given = inputs_of(2, 12, 7)
    seen = given["decoder_attention_mask"].bool()
    with torch.no_grad():
        found, wanted = (one(**given).logits[seen] for one in (compiled, model))
    assert found.dtype == kind
    scale = float(wanted.float().abs().max())
    torch.testing.assert_close(found.float(), wanted.float(), atol=0.05 * scale, rtol=0)


@pytest.mark.parametrize("pattern", some(["2:4", "block:4x1"], ["2:4"]))
@pytest.mark.parametrize("family", some(VARIED, ("mbart",)))
def test_patterns(family: str, pattern: str) -> None:
    model = pair_of(family, pattern=pattern, sparsity=0.5)
    compiled = hf_sparse.compile(model)
    ids, mask = ids_of(2, 33, right=4)
    options = {**GENERATED, "output_scores": True, "return_dict_in_generate": True}
    wanted, found = (one.generate(ids, attention_mask=mask, **options) for one in (model, compiled))
    assert torch.equal(found.sequences, wanted.sequences)
    for score, reference in zip(found.scores, wanted.scores, strict=True):
        torch.testing.assert_close(score, reference, **TOLERANCE)


@pytest.mark.parametrize("name", [name for name in target.targets() if name != "avx512"])
@pytest.mark.parametrize("family", some(VARIED, ()))
def test_other_vector_widths(family: str, name: str) -> None:
    model, _ = pair(family)
    compiled = compiled_for(name, model)
    ids, mask = ids_of(2, 45, right=4)
    generated = [one.generate(ids, attention_mask=mask, **GENERATED) for one in (model, compiled)]
    assert torch.equal(*generated)
    given = inputs_of(2, 45, 20)
    seen = given["decoder_attention_mask"].bool()
    with torch.no_grad():
        found, wanted = (one(**given).logits[seen] for one in (compiled, model))
    torch.testing.assert_close(found, wanted, **TOLERANCE)


FILES = [*((family, AutoModelForSeq2SeqLM) for family in CONFIGS)]
FILES += [("t5", T5EncoderModel), ("bart", BartForCausalLM)]


@pytest.mark.parametrize(
    "which", some(FILES, [("umt5", AutoModelForSeq2SeqLM), FILES[-1]]), ids=str
)
def test_a_saved_model_comes_back(which: tuple[str, Any], tmp_path: Path) -> None:
    family, auto = which
    _, compiled = pair(family, auto)
    hf_sparse.save_compiled(compiled, tmp_path)
    loaded = hf_sparse.load_compiled(tmp_path)
    given = (
        inputs_of(2, 19, 6) if auto is AutoModelForSeq2SeqLM else {"input_ids": ids_of(2, 19)[0]}
    )
    with torch.no_grad():
        for one in (loaded, copy.deepcopy(loaded)):
            assert same(one(**given)[0], compiled(**given)[0])
    if loaded.can_generate():
        found = (one.generate(given["input_ids"], **GENERATED) for one in (compiled, loaded))
        assert torch.equal(*found)


@pytest.mark.slow
def test_kernels_stay_within_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it ends at pages without access; a process of its own would end there."""
    for family in VARIED:
        hf_sparse.save_compiled(pair(family)[1], tmp_path / family)

    def run() -> None:
        torch.set_num_threads(1)
        guard_the_runtime(monkeypatch)
        for family in VARIED:
            loaded = hf_sparse.load_compiled(tmp_path / family)
            given = inputs_of(2, 64, 65)
            with torch.no_grad():
                loaded(**given)
                loaded.generate(given["input_ids"], **GENERATED)

    assert in_a_child(run) == 0


def test_the_result_does_not_hang_on_the_number_of_threads() -> None:
    for family in ("bart", "umt5"):
        _, compiled = pair(family)
        given = inputs_of(3, 70, 70)
        with torch.no_grad():
            torch.set_num_threads(1)
            wanted = compiled(**given).logits
            torch.set_num_threads(3)
            assert same(compiled(**given).logits, wanted)
        layers = [module for module in compiled.modules() if isinstance(module, CompiledLayer)]
        assert len(layers) == 5
        assert len({layer.runner for layer in layers}) == 2
