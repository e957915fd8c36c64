"""Compiled models against the models that they were compiled from."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    pipeline,
)

import hf_sparse
from hf_sparse.runtime.llvm import jit, target
from hf_sparse.runtime.model.compiled import CompiledLayer, linears_of, stack_of
from hf_sparse.runtime.model.families import COMPILED
from hf_sparse.runtime.model.single_layers import CompiledHead, CompiledLinear
from hf_sparse.runtime.programs.cache import alone_with
from hf_sparse.runtime.programs.pool import Pool
from hf_sparse.runtime.programs.program import Program
from hf_sparse.runtime.programs.shape import Shape
from hf_sparse.runtime.weights.rates import NOMINAL
from hf_sparse.upstream.transformers.caches import cache_in, cache_name
from tests.support.closeness import same
from tests.support.compiled_models import compiled_for
from tests.support.crosses import cross
from tests.support.sparse_models import inputs, random_model
from tests.support.tiny_models import CONFIGS, tiny_config, tiny_model, tiny_tokenizer

# Those whose heads and neurons are known; test_families.py has the others.
FAMILIES = list(CONFIGS)
CAUSAL = [name for name in FAMILIES if COMPILED[name].causal]
CACHE = cache_name(LlamaForCausalLM.forward)
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[PreTrainedModel, PreTrainedModel]]:
    found = {}
    for name in FAMILIES:
        model = random_model(CONFIGS[name])
        found[name] = (model, hf_sparse.compile(model))
    return found


@pytest.mark.few(1)
@cross("batch, tokens, name", [(1, 1), (1, 5), (3, 37), (2, 100)], FAMILIES)
def test_forward_and_hidden_states(models: dict, name: str, batch: int, tokens: int) -> None:
    model, compiled = models[name]
    causal = COMPILED[name].causal
    padding = {} if tokens < 5 else {"left": 3} if causal else {"right": 3}
    given = inputs(batch, tokens, **padding)
    with torch.no_grad():
        wanted = model(**given, output_hidden_states=True)
        plain = compiled(**given)
        found = compiled(**given, output_hidden_states=True)
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(plain.logits[seen], found.logits[seen], **TOLERANCE)
    torch.testing.assert_close(found.logits[seen], wanted.logits[seen], **TOLERANCE)
    assert len(found.hidden_states) == len(wanted.hidden_states)
    for state, reference in zip(found.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(state[seen], reference[seen], **TOLERANCE)
    assert type(compiled) is type(model)
    assert compiled.config.to_diff_dict() == model.config.to_diff_dict()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(models: dict, threads: int) -> None:
    _, compiled = models["bert"]
    given = inputs(5, 70, right=9)
    with torch.no_grad():
        torch.set_num_threads(1)
        wanted = compiled(**given).logits
        torch.set_num_threads(threads)
        assert same(compiled(**given).logits, wanted)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generate(models: dict, name: str, options: dict) -> None:
    model, compiled = models[name]
    given = inputs(2, 9, left=3)
    length = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 1}
    wanted = model.generate(**given, do_sample=False, **length, **options)
    assert torch.equal(compiled.generate(**given, do_sample=False, **length, **options), wanted)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_cache_goes_on_from_any_position(models: dict, name: str) -> None:
    """Several tokens at a time behind a past, across tiles, as one long input."""
    model, compiled = models[name]
    ids = inputs(2, 100)["input_ids"]
    with torch.no_grad():
        wanted = model(ids).logits
        cache = DynamicCache(config=compiled.config)
        parts = [
            compiled(part, **{CACHE: cache}).logits for part in ids.split((3, 1, 70, 1, 25), 1)
        ]
    assert cache.get_seq_length() == 100
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, **TOLERANCE)


def test_a_cache_that_the_model_filled_is_taken_over(models: dict) -> None:
    model, compiled = models["llama"]
    ids = inputs(2, 40)["input_ids"]
    with torch.no_grad():
        cache = cache_in(model(ids[:, :30], use_cache=True))
        found = compiled(ids[:, 30:], **{CACHE: cache}).logits
        wanted = model(ids).logits[:, 30:]
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    cache.crop(-5)
    with torch.no_grad():
        again = compiled(ids[:, 35:], **{CACHE: cache}).logits
    torch.testing.assert_close(again, found[:, 5:], **TOLERANCE)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=36, n_head=3, n_layer=2, vocab_size=256, n_inner=50),
        tiny_config("opt", word_embed_proj_dim=16, do_layer_norm_before=False),
        tiny_config("mistral", sliding_window=7),
        tiny_config("albert", inner_group_num=2),
        tiny_config("bert", hidden_act="relu"),
    ],
    ids=["odd-sizes", "norms-behind", "window", "groups", "relu"],
)
def test_variants_of_families(config: PreTrainedConfig) -> None:
    model = random_model(config)
    compiled = hf_sparse.compile(model)
    given = inputs(2, 33)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits, **TOLERANCE)
    if config.model_type in CAUSAL:
        length = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 1}
        assert torch.equal(model.generate(**given, **length), compiled.generate(**given, **length))


@pytest.mark.parametrize("name", [name for name in target.targets() if name != "avx512"])
@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_other_vector_widths(models: dict, name: str, family: str) -> None:
    model, _ = models[family]
    compiled = compiled_for(name, model)
    given = inputs(3, 37)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits, **TOLERANCE)


@pytest.mark.few(3)
@pytest.mark.parametrize("sparsity", [0.0, 0.95])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:2x1", "block:4x1", "block:16x1"])
def test_patterns_find_their_kernel(
    pattern: str, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the rates of one target, with the kernels of any: others have other kernels for some."""
    monkeypatch.setattr("hf_sparse.runtime.model.compiled.nominal", lambda _: NOMINAL["avx512"])
    model = random_model(CONFIGS["bert"], 0.0)
    if sparsity:
        fixed = None if pattern == "2:4" else 0.8
        hf_sparse.prune_(model, hf_sparse.SparsityConfig(pattern, fixed), "magnitude")
    compiled = hf_sparse.compile(model)
    wanted = {"unstructured": {1}, "2:4": {1, 2}, "block:2x1": {2}}.get(pattern, {4})
    found = {packed.height for linear in linears_of(compiled) for packed in linear.packed}
    assert found == (wanted if sparsity else {4})
    assert all(linear.is_dense != bool(sparsity) for linear in linears_of(compiled))
    given = inputs(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits, **TOLERANCE)


def test_the_model_stays_as_it_was_and_shares_what_is_not_packed(models: dict) -> None:
    model, compiled = models["bert"]
    assert all(parameter.requires_grad for parameter in model.parameters())
    names = {name for name, _ in compiled.named_parameters()}
    assert names
    assert not any("encoder" in name for name in names)
    shared = dict(model.named_parameters())
    for name, parameter in compiled.named_parameters():
        assert parameter.data_ptr() == shared[name].data_ptr()


def run_stack(compiled: PreTrainedModel) -> list[torch.Tensor]:
    """What the blocks make of random hidden states: as tiles, and of single tokens behind them."""
    (runner,) = {m.runner for m in compiled.modules() if isinstance(m, CompiledLayer)}
    stack, generator = runner.stack, torch.Generator().manual_seed(0)
    cache = DynamicCache(config=compiled.config) if stack.causal else None
    results = []
    for tokens in (37, 1, 1) if stack.causal else (37,):
        hidden = torch.randn(2, tokens, stack.hidden, generator=generator)
        angles = torch.randn(2, 1, tokens, stack.head_dim, generator=generator)
        rotation = [(angles[0], angles[1])] if stack.rotary else []
        results.append(runner(hidden, None, rotation, cache))
    return results


@pytest.mark.few(1)
@cross(
    "family, kind, sparsity, name",
    ["bert", "gpt2", "llama"],
    [torch.bfloat16, torch.float16],
    [0.6, 0.0],
    target.targets(),
)
def test_two_bytes_a_weight_give_what_float32_gives(
    family: str, kind: torch.dtype, sparsity: float, name: str
) -> None:
    """To the last bit, with half the bytes."""
    narrow = random_model(CONFIGS[family], sparsity).to(kind)
    wide = copy.deepcopy(narrow).float()
    compiled = [compiled_for(name, model) for model in (narrow, wide)]
    found, wanted = (run_stack(model) for model in compiled)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    assert {linear.dtype for linear in linears_of(compiled[0])} == {kind}
    for one, other in zip(linears_of(compiled[0]), linears_of(compiled[1]), strict=True):
        assert one.kernel == other.kernel
        assert one.nbytes < 0.9 * other.nbytes
        if not sparsity:
            assert one.nbytes == 2 * one.rows * one.columns
    with torch.no_grad():
        logits = compiled[0](**inputs(2, 12)).logits
    assert logits.dtype == kind
    if not sparsity and family != "gpt2":  # which has transposed weights; else nothing is copied
        given = {p.data_ptr() for p in narrow.parameters()}
        own = {packed.weight.data_ptr() for one in linears_of(compiled[0]) for packed in one.packed}
        assert len(own - given) <= len(stack_of(compiled[0]).blocks)  # joined queries, keys, values


def test_weights_of_different_types_become_float32() -> None:
    model = random_model(CONFIGS["llama"]).bfloat16()
    model.model.layers[1].mlp.float()
    compiled = hf_sparse.compile(model)
    assert {linear.dtype for linear in linears_of(compiled)} == {torch.float32}
    wanted = run_stack(hf_sparse.compile(model.float()))
    for one, other in zip(run_stack(compiled), wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_generation_of_two_byte_models(kind: torch.dtype) -> None:
    """The same tokens as torch's until two logits are closer than the type can tell."""
    model = random_model(CONFIGS["llama"]).to(kind)
    compiled = hf_sparse.compile(model)
    given = inputs(1, 9)
    with torch.no_grad():
        found, wanted = compiled(**given).logits, model(**given).logits
    assert found.dtype == kind
    torch.testing.assert_close(found.float(), wanted.float(), atol=0.05, rtol=0.05)
    length = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 1}
    assert compiled.generate(**given, do_sample=False, **length).shape == (1, 15)


def test_concurrent_callers_and_models(models: dict) -> None:
    given = [inputs(1 + number % 3, 5 + 7 * number) for number in range(6)]
    chosen = [models["bert"][1], models["gpt2"][1]]
    with torch.no_grad():
        wanted = [[model(**one).logits for one in given] for model in chosen]
    failures = []

    def work(seed: int) -> None:
        with torch.no_grad():
            for turn in range(30):
                which, number = (seed + turn) % 2, (seed * 5 + turn) % 6
                found = chosen[which](**given[number]).logits
                if not same(found, wanted[which][number]):
                    failures.append((which, number))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_pipeline(models: dict) -> None:
    tools = tiny_tokenizer()
    results = [
        pipeline("text-generation", model=model, tokenizer=tools)(
            "The value of", max_new_tokens=5, do_sample=False
        )
        for model in models["gpt2"]
    ]
    assert results[0] == results[1]


def test_bad_input_is_refused(models: dict) -> None:
    _, compiled = models["llama"]
    given = inputs(1, 6)
    with pytest.raises(ValueError, match="4 dimensions"):
        compiled(given["input_ids"], attention_mask=torch.zeros(1, 1, 6, 6))
    with pytest.raises(ValueError, match="shape"):
        compiled(given["input_ids"], attention_mask=torch.ones(1, 9))
    with pytest.raises(ValueError, match="packed sequences"):
        compiled(
            given["input_ids"], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False
        )
    with pytest.raises(ValueError, match="inference"):
        compiled.train()(**given)
    compiled.eval()
    embeds = torch.randn(1, 6, 32, requires_grad=True)
    with pytest.raises(ValueError, match="no gradients"):
        compiled(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="StaticLayer"):
        compiled.generate(**given, max_new_tokens=3, cache_implementation="static")


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_weights_are_refused(models: dict, name: str) -> None:
    """Whether the call or the config asks for them."""
    compiled = copy.deepcopy(models[name][1])
    with torch.no_grad():
        with pytest.raises(ValueError, match="output_attentions"):
            compiled(**inputs(1, 6), output_attentions=True)
        compiled(**inputs(1, 6), output_attentions=False)
        compiled.config._output_attentions = True  # as it was when the model was loaded
        with pytest.raises(ValueError, match="output_attentions"):
            compiled(**inputs(1, 6))


@pytest.mark.few(4)
@pytest.mark.parametrize("name", FAMILIES)
def test_another_number_of_blocks_is_refused(models: dict, name: str) -> None:
    model, compiled = (copy.deepcopy(one) for one in models[name])
    compiled.config.num_hidden_layers -= 1
    with torch.no_grad(), pytest.raises(ValueError, match="num_hidden_layers is"):
        compiled(**inputs(1, 6))
    with torch.no_grad():  # a copy has its own config
        models[name][1](**inputs(1, 6))
    if name != "albert":  # which takes the number of its blocks from the config alone
        model.config.num_hidden_layers -= 1
        with pytest.raises(ValueError, match="num_hidden_layers is"):
            hf_sparse.compile(model)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("mistral", "sliding_window", 3),
        ("qwen3", "layer_types", ["full_attention"]),
        ("llama", "is_causal", False),
        ("bert", "is_decoder", True),
    ],
)
def test_a_config_that_was_changed_is_refused(
    models: dict, family: str, name: str, value: object
) -> None:
    compiled = copy.deepcopy(models[family][1])
    setattr(compiled.config, name, value)
    for changed in (compiled, copy.deepcopy(compiled)):
        with torch.no_grad(), pytest.raises(ValueError, match=rf"config\.{name} is"):
            changed(**inputs(1, 6))
    with torch.no_grad():  # a copy has its own config
        models[family][1](**inputs(1, 6))


@pytest.mark.few(20)
@pytest.mark.parametrize("how", ["deleted", "reordered", "shortened", "replaced", "added"])
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_that_were_changed_are_refused(models: dict, name: str, how: str) -> None:
    compiled = copy.deepcopy(models[name][1])
    path, _, last = COMPILED[name].stack.rpartition(".")
    owner = compiled.base_model.get_submodule(path)
    blocks = blocks_of(compiled)
    if how == "deleted":
        del getattr(owner, last)[1]
    elif how == "replaced":
        getattr(owner, last)[1] = torch.nn.Identity()
    elif how == "added":
        getattr(owner, last).append(blocks[0])
    else:
        setattr(
            owner, last, torch.nn.ModuleList(blocks[::-1] if how == "reordered" else blocks[:2])
        )
    for changed in (compiled, copy.deepcopy(compiled)):
        with torch.no_grad(), pytest.raises(ValueError, match=f"{last} of this compiled"):
            changed(**inputs(1, 6))


@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["bert", "llama", "stablelm"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_is_not_loaded_into_a_compiled_model(family: str, strict: bool) -> None:
    model = tiny_model(family)
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.6), "magnitude")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = {name: tensor + 1 for name, tensor in before.items()}
    compiled = hf_sparse.compile(model)
    for loaded in (compiled, copy.deepcopy(compiled), compiled.base_model):
        with pytest.raises(ValueError, match="load_state_dict: this"):
            loaded.load_state_dict(other, strict=strict)
    with pytest.raises(ValueError, match="load_state_dict: this"):
        torch.nn.Sequential(compiled).load_state_dict(
            {f"0.{name}": tensor for name, tensor in other.items()}, strict=strict
        )
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    model.load_state_dict(other)  # whose own loading is as before


def blocks_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    family = COMPILED[model.config.model_type]
    return list(model.base_model.get_submodule(family.stack)._modules.values())


@cross("index, name", [0, 1, 2], [name for name in FAMILIES if name != "albert"])
def test_hooks_on_any_block_see_what_they_would_see(models: dict, name: str, index: int) -> None:
    seen: list[list[torch.Tensor]] = [[], []]
    for model, kept in zip((copy.deepcopy(one) for one in models[name]), seen, strict=True):
        block = blocks_of(model)[index]
        block.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].clone()))
        block.register_forward_hook(lambda *given, kept=kept: kept.append(given[-1].clone()))
        model = copy.deepcopy(model)  # hooks are copied with it
        with torch.no_grad():
            model(**inputs(2, 9))
    wanted, found = seen
    assert len(found) == len(wanted) == 2
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_hidden_states_of_a_model_that_gave_them_before() -> None:
    model, given = random_model(CONFIGS["llama"]), inputs(1, 5)
    with torch.no_grad():
        wanted = model(**given, output_hidden_states=True).hidden_states
        compiled = hf_sparse.compile(model)
        for one in (compiled, copy.deepcopy(compiled)):
            found = one(**given, output_hidden_states=True).hidden_states
            torch.testing.assert_close(found, wanted, **TOLERANCE)


@pytest.mark.parametrize("how", ["returned", "in place", "before"])
def test_hooks_that_change_hidden_states_are_refused(models: dict, how: str) -> None:
    compiled = copy.deepcopy(models["llama"][1])
    block = blocks_of(compiled)[1]
    given = inputs(1, 6)
    if how == "before":
        hook = block.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    elif how == "returned":
        hook = block.register_forward_hook(lambda *given: 2 * given[-1])
    else:
        hook = block.register_forward_hook(lambda *given: [given[-1].mul_(2)].clear())
    with torch.no_grad():
        with pytest.raises(ValueError, match="a hook changed"):
            compiled(**given)
        hook.remove()
        wanted = models["llama"][1](**given).logits
        assert torch.equal(compiled(**given).logits, wanted)


def test_what_a_hook_makes_of_the_last_block_is_used(models: dict) -> None:
    results = []
    for model in (copy.deepcopy(one) for one in models["llama"]):
        blocks_of(model)[-1].register_forward_hook(lambda *given: given[-1] + 1)
        with torch.no_grad():
            results.append(model(**inputs(1, 6)).logits)
    torch.testing.assert_close(*results, **TOLERANCE)


def test_attention_in_both_directions_with_a_cache() -> None:
    config = tiny_config("llama", is_causal=False)
    model = random_model(config)
    compiled = hf_sparse.compile(model)
    ids = inputs(2, 40)["input_ids"]
    results: list[list[torch.Tensor]] = []
    for one in (model, compiled):
        cache = DynamicCache(config=one.config)
        with torch.no_grad():
            parts = ids.split((30, 1, 9), dim=1)
            results.append([one(part, **{CACHE: cache}).logits for part in parts])
        assert cache.get_seq_length() == 40
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, **TOLERANCE)
    windows = {"is_causal": False, "sliding_window": 7}
    config = tiny_config("mistral", **windows)
    assert "is_causal=False" in hf_sparse.compile(random_model(config)).explain().reason


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated
@pytest.mark.parametrize("family", ["bert", "stablelm"])
def test_tracing_is_refused(family: str) -> None:
    model = tiny_model(family)
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.7), "magnitude")
    compiled = hf_sparse.compile(model)
    compiled.config.return_dict = False
    with torch.no_grad(), pytest.raises(ValueError, match="cannot be traced"):
        torch.jit.trace(compiled, inputs(1, 6)["input_ids"])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("part", ["mlp.up_proj.weight", "input_layernorm.weight"])
def test_weights_that_are_not_finite_are_refused(part: str, value: float) -> None:
    model = random_model(CONFIGS["llama"], 0.0)
    with torch.no_grad():
        model.model.layers[1].get_parameter(part).view(-1)[3] = value
    name = part.rpartition(".")[0]
    with pytest.raises(ValueError, match=f"layers.1.{name}.* 1 values that are NaN or infinite"):
        hf_sparse.compile(model)


@pytest.mark.few(2)
@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_packed_is_finite(value: float, whole: bool, kind: torch.dtype) -> None:
    """Embeddings, the final norm, the head; also layers of the blocks that torch computes."""
    model = tiny_model("gpt2" if whole else "stablelm", tie_word_embeddings=False).to(kind)
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.7), "magnitude")
    blocks = "transformer.h" if whole else "model.layers"
    checked = {n: p for n, p in model.named_parameters() if not n.startswith(f"{blocks}.")}
    assert len(checked) >= 4
    for name, parameter in checked.items():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[5] = value
            with pytest.raises(ValueError, match=f"{name} has 1 values that are NaN or infinite"):
                hf_sparse.compile(model)
            parameter.copy_(before)
    hf_sparse.compile(model)


@pytest.mark.parametrize("family", ["llama", "stablelm"])
def test_types_that_torch_cannot_compute_with_are_refused(family: str) -> None:
    model = tiny_model(family).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="float8_e4m3fn; wanted one of"):
        hf_sparse.compile(model)


@pytest.mark.parametrize("tokens", [1, 20])
def test_programs_that_are_dropped_are_freed_at_once(models: dict, tokens: int) -> None:
    """Their buffers must not wait for Python's collector of cycles, which seldom runs."""
    (runner,) = {m.runner for m in models["llama"][1].modules() if isinstance(m, CompiledLayer)}
    shape = Shape(1, tokens, 1, True, 512, False)
    gc.disable()
    try:
        program = runner._make(shape)
        assert program.nbytes > program.seen.tables.nbytes
        freed = weakref.ref(program.program)
        del program
        assert freed() is None
    finally:
        gc.enable()


def test_models_that_cannot_be_compiled_are_refused() -> None:
    with pytest.raises(ValueError, match=r"family 'stablelm'.*40 % zeros"):
        hf_sparse.compile(tiny_model("stablelm"))
    with pytest.raises(ValueError, match="Linear"):
        hf_sparse.compile(torch.nn.Linear(2, 2))
    config = GPT2Config(n_embd=32, n_head=2, n_layer=1, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        hf_sparse.compile(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match="target 'sse9'"):
        hf_sparse.compile(random_model(CONFIGS["bert"]), target="sse9")
    with pytest.raises(ValueError, match="not compiled"):
        stack_of(random_model(CONFIGS["bert"]))
    with pytest.raises(ValueError, match="already"):
        hf_sparse.compile(hf_sparse.compile(random_model(CONFIGS["bert"])))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["stablelm", "gpt2"])
def test_other_models_get_compiled_layers(family: str) -> None:
    """Also GPT-2 with an option that its kernels cannot do, whose layers are Conv1Ds."""
    model = tiny_model(family, seed=3)
    if family == "gpt2":
        model.config.scale_attn_by_inverse_layer_idx = True
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.7), "magnitude")
    dense = [name for name, layer in model.named_modules() if type(layer) is torch.nn.Linear]
    compiled = hf_sparse.compile(model)
    given = inputs(2, 21)
    with torch.no_grad():
        wanted, found = model(**given)[0], compiled(**given)[0]
        torch.testing.assert_close(found, wanted, **TOLERANCE)
        traced = torch.compile(compiled, backend="eager")(**given)[0]
    torch.testing.assert_close(traced, wanted, **TOLERANCE)
    explained = compiled.explain(tokens=32)
    single = [name for name, layer in compiled.named_modules() if type(layer) is CompiledLinear]
    assert [layer.name for layer in explained.layers] == single
    assert explained.reason is not None
    assert explained.layers
    assert set(explained.torch_layers) <= set(dense)
    assert "not compiled as a whole" in str(explained)


def test_single_layers_share_what_they_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are counted, and all layers of a model stay within one bound."""
    monkeypatch.setattr("hf_sparse.runtime.model.layer_by_layer.KEPT_BYTES", 400_000)
    model = tiny_model("stablelm", hidden_size=64)
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.7), "magnitude")
    compiled = hf_sparse.compile(model)
    layers = [layer for layer in compiled.modules() if isinstance(layer, CompiledLinear)]
    (pool,) = {layer._pool for layer in copy.deepcopy(compiled).modules() if layer in layers}
    numbers = []
    for tokens in (9, 70, 130, 40, 9, 70):
        with torch.no_grad():
            given = {"input_ids": inputs(1, tokens)["input_ids"]}
            torch.testing.assert_close(compiled(**given)[0], model(**given)[0], **TOLERANCE)
        kept = [item for items in pool._idle.values() for item in items]
        assert pool.nbytes == sum(item.nbytes for item in kept) <= 400_000
        programs = [item for item in kept if isinstance(item, Program)]
        assert all(item.nbytes >= item._operations.nbytes for item in programs)
        buffers = [item for item in kept if not isinstance(item, Program)]
        assert len(buffers) <= len({(one.in_features, one.out_features) for one in layers})
        numbers.append(len(programs))
    # Three blocks of seven layers for a shape, until the bound is reached.
    assert numbers[:2] == [21, 42]
    assert max(numbers) < 4 * 21


def test_a_pool_keeps_what_was_used_last() -> None:
    pool: Pool[np.ndarray] = Pool(100)
    for key in ("a", "b", "a", "c"):
        with pool.borrow(key, functools.partial(np.zeros, 40, np.uint8)):
            pass
    assert list(pool._idle) == ["a", "c"]
    new = functools.partial(np.zeros, 40, np.uint8)
    with pool.borrow("a", new) as one, pool.borrow("a", new) as other:
        assert one is not other
    assert list(pool._idle) == ["a"]
    assert pool.nbytes == 80
    with pool.borrow("large", lambda: np.zeros(400, np.uint8)):
        pass
    assert list(pool._idle) == ["large"]  # the last one stays, whatever its size
    assert pool.nbytes == 400


def test_explain_tells_each_layer() -> None:
    model = random_model(CONFIGS["bert"], 0.0)
    queries = hf_sparse.SparsityConfig("unstructured", 0.9, targets=["query", "key", "value"])
    hf_sparse.prune_(model, queries, "magnitude")
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4", targets=["output.dense"]), "magnitude")
    compiled = hf_sparse.compile(model)
    explained = compiled.explain(tokens=100)
    assert explained.reason is None
    assert len(explained.layers) == 4 * 3
    patterns = [layer.pattern for layer in explained.layers]
    assert patterns == ["unstructured", "2:4", "dense", "2:4"] * 3
    for layer, linear in zip(explained.layers, linears_of(compiled), strict=True):
        assert layer.sparsity == pytest.approx(
            {"unstructured": 0.9, "2:4": 0.5}.get(layer.pattern, 0), abs=1e-3
        )
        assert layer.nbytes == linear.nbytes
        assert layer.predicted > 0
        assert layer.measured > 0
        assert layer.name in str(explained)
    with pytest.raises(ValueError, match="tokens"):
        compiled.explain(tokens=0)


@pytest.mark.slow
def test_a_compiled_head_equals_the_linear() -> None:
    linear = torch.nn.Linear(32, 64)
    head = CompiledHead(linear, target.host(), None).eval()
    with torch.no_grad():
        for shape in ((1, 1, 32), (4, 32), (2, 2, 32), (7, 32), (0, 32)):
            x = torch.randn(shape)
            torch.testing.assert_close(head(x), linear(x))
    assert not CompiledHead.suits(torch.nn.Linear(30, 64))
    assert not CompiledHead.suits(linear.bfloat16())  # for its bias


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_a_head_of_two_byte_weights_sums_in_float32(kind: torch.dtype) -> None:
    linear = torch.nn.Linear(64, 32, bias=False)
    narrow, wide = copy.deepcopy(linear).to(kind), linear.to(kind).float()
    heads = [CompiledHead(one, target.host(), None).eval() for one in (narrow, wide)]
    assert all(CompiledHead.suits(one) for one in (narrow, wide))
    with torch.no_grad():
        for tokens in (1, 3):
            x = torch.randn(1, tokens, 64).to(kind)
            found, wanted = heads[0](x), heads[1](x.float())
            assert torch.equal(found, wanted.to(kind))
        x = torch.randn(9, 64).to(kind)
        torch.testing.assert_close(heads[0](x), narrow(x))


def test_the_code_cache_is_used_and_checked(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_sparse.runtime.kernels import tiles

    chosen = target.host()
    functions = [tiles.copy(chosen)]
    jit.compile_kernels(functions, chosen, tmp_path)
    (file,) = (path for path in tmp_path.iterdir() if path.name != "key")
    whole = file.read_bytes()
    for damaged in (whole[:-1], b"", b"foreign", whole[:60] + b"\0" + whole[61:]):
        file.write_bytes(damaged)
        jit.compile_kernels(functions, chosen, tmp_path)
        assert file.read_bytes() == whole
    monkeypatch.setattr(jit, "_compile", None)  # from here on nothing is compiled
    jit.compile_kernels(functions, chosen, tmp_path)
    with pytest.raises(TypeError):
        jit.compile_kernels(functions, chosen, None)


def test_copies_share_the_weights_and_nothing_else_stores_them(
    models: dict, tmp_path: Path
) -> None:
    _, compiled = models["llama"]
    given = inputs(2, 9)
    twin = copy.deepcopy(compiled)
    with torch.no_grad():
        assert torch.equal(twin(**given).logits, compiled(**given).logits)
    assert stack_of(twin) is stack_of(compiled)
    for store in (
        lambda: compiled.save_pretrained(tmp_path),
        lambda: pickle.dumps(compiled),
        lambda: torch.save(compiled, tmp_path / "model.pt"),
    ):
        with pytest.raises(ValueError, match="save_compiled"):
            store()


@pytest.mark.parametrize("whole", [True, False])
def test_what_needs_weights_refuses_compiled_models(tmp_path: Path, whole: bool) -> None:
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=not whole)
    config = hf_sparse.SparsityConfig("unstructured", 0.7)
    hf_sparse.prune_(model, config, "magnitude")
    compiled = hf_sparse.compile(model)
    for use in (
        lambda: hf_sparse.save_pretrained(compiled, tmp_path / "folder"),
        lambda: hf_sparse.export_onnx(compiled, tmp_path / "folder"),
        lambda: hf_sparse.prune_(compiled, config, "magnitude"),
        lambda: hf_sparse.measure_sparsity(compiled),
        lambda: hf_sparse.shrink_(compiled),
    ):
        with pytest.raises(ValueError, match="Take the model that was compiled"):
            use()
    assert not (tmp_path / "folder").exists()


def test_a_cache_is_cropped_as_transformers_crops_it(models: dict) -> None:
    _, compiled = models["llama"]
    with torch.no_grad():
        cache = cache_in(compiled(**inputs(1, 8), use_cache=True))
    with pytest.raises(ValueError, match="negative"):
        cache.crop(5)
    cache.crop(-3)
    assert cache.get_seq_length() == 5


def test_defaults_of_torch_do_not_reach_the_kernels(models: dict) -> None:
    _, compiled = models["bert"]
    given = inputs(3, 41)
    with torch.no_grad():
        wanted = compiled(**given).logits
        for kind in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(kind)
            try:
                fresh = hf_sparse.compile(models["bert"][0])
                assert same(fresh(**given).logits, wanted)
            finally:
                torch.set_default_dtype(torch.float32)


def test_buffers_serve_inference_mode_and_others(models: dict) -> None:
    compiled = hf_sparse.compile(models["llama"][0])
    given = inputs(2, 23, left=2)
    with torch.inference_mode():
        wanted = compiled(**given).logits
    with torch.no_grad():
        assert torch.equal(compiled(**given).logits, wanted)


def test_foreign_widths_and_caches_are_refused(models: dict) -> None:
    _, compiled = models["llama"]
    with torch.no_grad():
        with pytest.raises(ValueError, match="hidden states"):
            compiled(inputs_embeds=torch.randn(1, 6, 16))
        cache = cache_in(models["gpt2"][1](**inputs(1, 5), use_cache=True))
        with pytest.raises(ValueError, match="another"):
            compiled(**inputs(1, 1), **{CACHE: cache})
        cache = cache_in(models["gpt2"][0](**inputs(1, 5), use_cache=True))
        with pytest.raises(ValueError, match="another"):
            compiled(inputs(1, 1)["input_ids"], **{CACHE: cache})


def test_layers_that_are_no_plain_linears_are_refused() -> None:
    model = random_model(CONFIGS["bert"])
    layer = model.base_model.encoder.layer[1].output.dense
    torch.nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match="plain Linear"):
        hf_sparse.compile(model)


@pytest.mark.slow
def test_a_head_that_was_changed_is_left_to_torch() -> None:
    head = CompiledHead(torch.nn.Linear(32, 64), target.host(), None).eval()
    x = torch.randn(2, 32)
    with torch.no_grad():
        wanted = head(x)
        twin = copy.deepcopy(head)
        twin.weight.mul_(2)
        assert torch.equal(head(x), wanted)
        head.weight = torch.nn.Parameter(torch.randn(8, 32))
        head.bias = None
        torch.testing.assert_close(head(x), x @ head.weight.T)


def test_threads_do_not_share_a_cache(models: dict) -> None:
    _, compiled = models["llama"]
    cache = DynamicCache(config=compiled.config)
    given = inputs(1, 5)
    with torch.no_grad(), alone_with(cache), pytest.raises(ValueError, match="another thread"):
        compiled(**given, **{CACHE: cache})
    with torch.no_grad():
        compiled(**given, **{CACHE: cache})
    assert cache.get_seq_length() == 5
