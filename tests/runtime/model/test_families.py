"""Every family that is compiled as a whole against transformers: heads, padding, generation, files."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    PreTrainedModel,
)

import hf_sparse
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.model.compiled import CompiledLayer, stack_of
from hf_sparse.runtime.model.families import COMPILED, NAMES
from hf_sparse.runtime.programs import row_steps
from hf_sparse.upstream.transformers.caches import cache_name
from tests.support.closeness import same
from tests.support.compiled_families import (
    DECODERS,
    ENCODERS,
    FAMILIES,
    config_of,
    inputs_of,
    model_of,
    seen,
    tensors_of,
)
from tests.support.compiled_models import change_attribute, compiled_for
from tests.support.crosses import cross
from tests.support.tiny_models import CONFIGS

TOLERANCE = {"atol": 3e-5, "rtol": 1e-4}
HEADS = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "sequence": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "question": AutoModelForQuestionAnswering,
    "choice": AutoModelForMultipleChoice,
    "image": AutoModelForImageClassification,
}
GENERATED = {"max_new_tokens": 11, "min_new_tokens": 11, "do_sample": False, "pad_token_id": 1}


@functools.cache
def pair(family: str, head: Any = AutoModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    model = model_of(family, head)
    return model, hf_sparse.compile(model)


def heads_of(family: str) -> list[str]:
    config = type(config_of(family))
    return [name for name, head in HEADS.items() if config in head._model_mapping]


def some(names: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """All values, of which the fast suite takes those that are told."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


# Between them they have every kind of part that a block can have.
VARIED = ("mpnet", "modernbert", "gpt_neox", "gemma3_text", "olmo2", "granite", "mixtral")


def test_every_family_is_tried() -> None:
    assert {*FAMILIES, *CONFIGS} == set(COMPILED)


def test_the_reference_lists_every_family() -> None:
    text = (Path(hf_sparse.__file__).parents[1] / "docs/reference.md").read_text()
    table = text.partition("Compiled as a whole:")[2].partition("\n\nIt works")[0]
    assert {*re.findall("`([^`]+)`", table)} == set(NAMES)


@pytest.mark.few(1)
@cross("batch, tokens, family", [(1, 1), (1, 5), (3, 37), (2, 100)], FAMILIES)
def test_hidden_states(family: str, batch: int, tokens: int) -> None:
    model, compiled = pair(family)
    padding = {} if tokens < 5 else {"right": 3} if family in ENCODERS else {"left": 3}
    given = inputs_of(family, batch, tokens, **padding)
    with torch.no_grad():
        wanted = model(**given, output_hidden_states=True)
        plain = compiled(**given)
        found = compiled(**given, output_hidden_states=True)
    torch.testing.assert_close(seen(plain[0], given), seen(wanted[0], given), **TOLERANCE)
    assert len(found.hidden_states) == len(wanted.hidden_states)
    for state, reference in zip(found.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(seen(state, given), seen(reference, given), **TOLERANCE)
    assert type(compiled) is type(model)
    assert compiled.explain(tokens=1).reason is None


PAIRS = [(family, head) for family in FAMILIES for head in heads_of(family)]
FIRST = [("vit", "image"), ("roberta", "choice"), ("mpnet", "question"), ("electra", "tokens")]
FIRST += [("distilbert", "masked"), ("modernbert", "sequence"), ("gemma2", "causal")]
FIRST += [("phi3", "tokens"), ("gpt_neox", "question"), ("granite", "causal")]


@pytest.mark.few(2)
@pytest.mark.parametrize("padding", some(["left", "right"], ["left"]))
@pytest.mark.parametrize("which", some(PAIRS, FIRST))
def test_every_head(which: tuple[str, str], padding: str) -> None:
    family, head = which
    model = model_of(family, HEADS[head], sparsity=0.5)
    compiled = hf_sparse.compile(model)
    given = inputs_of(family, 2, 21, **{padding: 4})
    if head == "choice":
        given = {name: value.view(1, *value.shape) for name, value in given.items()}
    with torch.no_grad():
        wanted, found = (list(tensors_of(one(**given))) for one in (model, compiled))
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        by_token = tuple(one.shape[:2]) == (2, 21)  # those of padding may be anything
        parts = (seen(each, given) if by_token else each for each in (one, other))
        torch.testing.assert_close(*parts, **TOLERANCE)


OPTIONS: list[dict[str, Any]] = [{"num_beams": 3}, {}, {"use_cache": False}]


@pytest.mark.few(1)
@pytest.mark.parametrize("options", some(OPTIONS, [{"num_beams": 3}]), ids=str)
@pytest.mark.parametrize("family", some(DECODERS, ("gpt_neox", "gemma2", "smollm3", "mixtral")))
def test_generate(family: str, options: dict[str, Any]) -> None:
    """Past every sliding window, with padding, from the cache and without."""
    model, compiled = pair(family, AutoModelForCausalLM)
    given = inputs_of(family, 2, 9, left=3)
    wanted = model.generate(**given, **GENERATED, **options)
    assert torch.equal(compiled.generate(**given, **GENERATED, **options), wanted)


@pytest.mark.few(1)
@pytest.mark.parametrize("family", DECODERS)
def test_a_cache_goes_on_from_any_position(family: str) -> None:
    """Several tokens at a time, and single ones by rows, on more threads than one."""
    model, compiled = pair(family, AutoModelForCausalLM)
    assert row_steps.fits(stack_of(compiled))
    ids = inputs_of(family, 2, 84)["input_ids"]
    torch.set_num_threads(2)
    with torch.no_grad():
        wanted = model(ids).logits
        cache = DynamicCache(config=compiled.config)
        name = cache_name(model.forward)
        parts = [
            compiled(part, **{name: cache}).logits for part in ids.split((3, 1, 1, 70, 1, 8), 1)
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, **TOLERANCE)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma3_text"])
def test_a_cache_that_the_model_filled_is_taken_over(family: str) -> None:
    model, compiled = pair(family, AutoModelForCausalLM)
    ids = inputs_of(family, 2, 20)["input_ids"]
    name = cache_name(model.forward)
    with torch.no_grad():
        wanted = model(ids).logits[:, 15:]
        cache = DynamicCache()  # whole, whatever the windows are
        model(ids[:, :15], **{name: cache})
        found = compiled(ids[:, 15:], **{name: cache}).logits
    torch.testing.assert_close(found, wanted, **TOLERANCE)


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", some(FAMILIES, ("mpnet", "gemma2", "mixtral")))
def test_two_byte_models(family: str, kind: torch.dtype) -> None:
    """As the same weights in float32, up to what torch rounds around the blocks."""
    model = model_of(family).to(kind)
    compiled = hf_sparse.compile(model)
    assert stack_of(compiled).weight_type.dtype == kind
    given = {
        name: value.to(kind) if value.is_floating_point() else value
        for name, value in inputs_of(family, 2, 12).items()
    }
    with torch.no_grad():
        found, wanted = compiled(**given)[0], model(**given)[0]
    assert found.dtype == kind
    scale = float(wanted.float().abs().max())
    torch.testing.assert_close(found.float(), wanted.float(), atol=0.05 * scale, rtol=0)


@pytest.mark.few(1)
@pytest.mark.parametrize("family", some(FAMILIES, VARIED))
def test_a_saved_model_comes_back(family: str, tmp_path: Path) -> None:
    auto = AutoModelForCausalLM if family in DECODERS else AutoModel
    _, compiled = pair(family, auto)
    hf_sparse.save_compiled(compiled, tmp_path)
    loaded = hf_sparse.load_compiled(tmp_path)
    given = inputs_of(family, 2, 19)
    with torch.no_grad():
        assert same(loaded(**given)[0], compiled(**given)[0])
        twin = copy.deepcopy(loaded)
        assert same(twin(**given)[0], compiled(**given)[0])


@pytest.mark.parametrize("name", [name for name in target.targets() if name != "avx512"])
@pytest.mark.parametrize("family", some(("mpnet", "modernbert", "gemma2"), ("gemma2",)))
def test_other_vector_widths(family: str, name: str) -> None:
    model, _ = pair(family)
    compiled = compiled_for(name, model)
    given = inputs_of(family, 2, 45)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given)[0], model(**given)[0], **TOLERANCE)


REFUSED = [
    ("roberta", {"is_decoder": True}, "is_decoder=True"),
    ("roberta", {"hidden_act": "mish"}, "activation 'mish'"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm=True"),
    ("phi3", {"head_dim": 6}, "heads of size 6"),
    ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping=-1.0"),
    ("granite", {"residual_multiplier": 0.0}, "residual_multiplier=0.0"),
    ("granite", {"residual_multiplier": 1e-4}, "an epsilon of"),
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("family", "changes", "reason"), REFUSED)
def test_what_kernels_cannot_do_goes_layer_by_layer(
    family: str, changes: dict[str, Any], reason: str
) -> None:
    compiled = hf_sparse.compile(model_of(family, **changes))
    assert reason in compiled.explain(tokens=1).reason


VARIANTS = [
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("phi3", {"sliding_window": None, "partial_rotary_factor": 1.0}),
    ("modernbert", {"norm_bias": True, "mlp_bias": True, "attention_bias": True}),
    ("starcoder2", {"use_bias": False}),
    ("mpnet", {"num_attention_heads": 2}),
    ("gemma", {"head_dim": 32, "attention_bias": True}),
]


@pytest.mark.few(2)
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_variants_of_families(family: str, changes: dict[str, Any]) -> None:
    model = model_of(family, **changes)
    compiled = hf_sparse.compile(model)
    assert compiled.explain(tokens=1).reason is None
    given = inputs_of(family, 2, 33)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given)[0], model(**given)[0], **TOLERANCE)


@pytest.mark.parametrize("family", ["roberta", "mpnet", "distilbert", "electra"])
def test_sequences_past_the_positions_are_an_error_as_in_torch(family: str) -> None:
    for one in pair(family):
        with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
            one(**inputs_of(family, 1, 131))


@pytest.mark.parametrize(
    ("family", "index", "name"),
    [
        ("gemma2", 1, "self_attn.attn_logit_softcapping"),
        ("granite", 2, "residual_multiplier"),
        ("smollm3", 1, "self_attn.use_rope"),
        ("modernbert", 2, "attn.sliding_window"),
        ("gpt_neox", 0, "use_parallel_residual"),
        ("mpnet", 1, "attention.attn.attention_head_size"),
    ],
)
def test_attributes_that_are_built_in_are_compared(family: str, index: int, name: str) -> None:
    model = model_of(family)
    change_attribute(model.get_submodule(COMPILED[family].stack)[index], name)
    with pytest.raises(ValueError, match=rf"\.{index}\.{name} is 0\.123; its config makes it"):
        hf_sparse.compile(model)


@pytest.mark.parametrize(
    ("family", "name"), [("mpnet", "attention.attn.q"), ("phi3", "mlp.activation_fn")]
)
def test_hooks_and_other_classes_in_blocks_are_refused(family: str, name: str) -> None:
    model = model_of(family)
    block = model.get_submodule(COMPILED[family].stack)[1]
    block.get_submodule(name).register_forward_hook(lambda *given: None)
    with pytest.raises(ValueError, match=rf"1\.{name} has a forward hook"):
        hf_sparse.compile(model)


def test_a_bias_that_is_not_by_distance_alone_is_refused() -> None:
    compiled = copy.deepcopy(pair("mpnet")[1])
    encoder = compiled.encoder
    before = encoder.compute_position_bias
    encoder.compute_position_bias = lambda x: before(x) + torch.arange(x.shape[1])
    with torch.no_grad(), pytest.raises(ValueError, match="depends on the distance alone"):
        compiled(**inputs_of("mpnet", 1, 9))


def test_the_rotations_of_all_kinds_of_attention_are_needed() -> None:
    """A rotary embedding that was exchanged afterwards tells nothing of the other kind."""
    compiled = copy.deepcopy(pair("gemma3_text")[1])
    compiled.rotary_emb._forward_hooks.clear()
    compiled.rotary_emb._forward_hooks_with_kwargs.clear()
    with torch.no_grad(), pytest.raises(ValueError, match="position_embeddings are missing"):
        compiled(**inputs_of("gemma3_text", 1, 9))


def test_the_result_does_not_hang_on_the_number_of_threads() -> None:
    """Buffers, waits and per-head operations of the scored kernel are the threads' own."""
    for family in ("gemma2", "modernbert", "olmo2", "gpt_neox"):
        _, compiled = pair(family)
        given = inputs_of(family, 3, 70)
        with torch.no_grad():
            torch.set_num_threads(1)
            wanted = compiled(**given)[0]
            torch.set_num_threads(3)
            assert same(compiled(**given)[0], wanted)
        assert sum(isinstance(module, CompiledLayer) for module in compiled.modules()) == 3
