"""Our loop of `generate` gives what transformers' loop gives, and stands aside where it cannot."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

import hf_sparse
from hf_sparse.runtime.model import generation
from hf_sparse.runtime.model.families import COMPILED
from tests.support.compiled_families import DECODERS, inputs_of, model_of

FAMILIES = [name for name in DECODERS if COMPILED[name].last_norm is not None]
LENGTH = {"max_new_tokens": 12, "pad_token_id": 1}


@functools.cache
def compiled(family: str) -> Any:
    return hf_sparse.compile(model_of(family, AutoModelForCausalLM))


def by_transformers(model: Any, **given: Any) -> Any:
    """What the compiled model gives by transformers' own loop."""
    return type(model).generate(model, **given)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each token that our loop computes."""
    counted: list[int] = []
    logits = generation.Ends.logits

    def counting(self: Any, tokens: Any, *args: Any) -> Any:
        counted.append(len(tokens))
        return logits(self, tokens, *args)

    monkeypatch.setattr(generation.Ends, "logits", counting)
    return counted


class Stream:
    """What a streamer is given."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.few(1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("left", [0, 4], ids=["whole", "padded"])
def test_every_family_gives_the_tokens_of_transformers_loop(
    family: str, left: int, steps: list[int]
) -> None:
    model, given = compiled(family), inputs_of(family, 2, 9, left=left)
    options = {**LENGTH, "min_new_tokens": 12, "do_sample": False}
    wanted = by_transformers(model, **given, **options)
    assert not steps
    assert torch.equal(model.generate(**given, **options), wanted)
    assert steps == [2] * 11


def test_which_families_are_left_to_transformers_loop() -> None:
    left = {name for name, blocks in COMPILED.items() if blocks.causal and not blocks.last_norm}
    assert left == {"gpt2", "opt", "gemma2", "gemma3_text", "granite", "phi3"}


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.3, "top_k": 20},
        {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
        {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"generation_config": GenerationConfig(do_sample=True, top_k=5)},
    ],
    ids=str,
)
def test_sampling_with_a_seed_draws_the_same_tokens(
    options: dict[str, Any], steps: list[int]
) -> None:
    model, given = compiled("olmo2"), inputs_of("olmo2", 2, 7)
    torch.manual_seed(3)
    wanted = by_transformers(model, **given, **LENGTH, **options)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**given, **LENGTH, **options), wanted)
    assert steps


def test_sequences_end_where_their_end_token_comes(steps: list[int]) -> None:
    model, given = compiled("olmo2"), inputs_of("olmo2", 2, 7)
    free = by_transformers(model, **given, **LENGTH, do_sample=False)
    end = int(free[0, 9])
    options = {**LENGTH, "do_sample": False, "eos_token_id": end}
    wanted = by_transformers(model, **given, **options)
    found = model.generate(**given, **options)
    assert torch.equal(found, wanted)
    assert len(steps) < 11 or int((found[0, 10:] == 1).sum()) == found.shape[1] - 10


def test_processors_criteria_and_streamers_of_the_caller_are_asked(steps: list[int]) -> None:
    class Forbids(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            scores[:, input_ids[0, -1]] = -torch.inf
            return scores

    class AtLength(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 12)

    model, given = compiled("olmo2"), inputs_of("olmo2", 1, 7)
    results, streams = [], [Stream(), Stream()]
    for call, stream in zip(
        (functools.partial(by_transformers, model), model.generate), streams, strict=True
    ):
        options = {
            "logits_processor": LogitsProcessorList([Forbids()]),
            "stopping_criteria": StoppingCriteriaList([AtLength(), MaxLengthCriteria(40)]),
            "streamer": stream,
        }
        results.append(call(**given, **LENGTH, do_sample=False, **options))
    assert torch.equal(*results)
    assert results[0].shape[1] == 12
    assert streams[0].tokens == streams[1].tokens
    assert streams[1].ended
    assert len(steps) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"return_dict_in_generate": True, "output_scores": True},
        {"use_cache": False},
        {"generation_config": GenerationConfig(num_beams=2)},
    ],
    ids=str,
)
def test_what_our_loop_cannot_do_goes_to_transformers(
    options: dict[str, Any], steps: list[int]
) -> None:
    model, given = compiled("olmo2"), inputs_of("olmo2", 2, 7)
    wanted = by_transformers(model, **given, **LENGTH, do_sample=False, **options)
    found = model.generate(**given, **LENGTH, do_sample=False, **options)
    tokens = [getattr(one, "sequences", one) for one in (wanted, found)]
    assert torch.equal(*tokens)
    assert not steps


def test_beams_of_the_models_own_settings_are_seen(steps: list[int]) -> None:
    model = copy.deepcopy(compiled("olmo2"))
    model.generation_config.num_beams = 3
    given = inputs_of("olmo2", 2, 7)
    config = GenerationConfig(max_new_tokens=5, pad_token_id=1)
    wanted = by_transformers(model, **given, generation_config=config)
    assert torch.equal(model.generate(**given, generation_config=config), wanted)
    assert not steps


def test_assisted_decoding_gives_the_tokens_of_the_model(steps: list[int]) -> None:
    model, given = compiled("olmo2"), inputs_of("olmo2", 1, 7)
    options = {**LENGTH, "do_sample": False}
    wanted = by_transformers(model, **given, **options)
    found = model.generate(**given, **options, assistant_model=copy.deepcopy(model))
    assert torch.equal(found, wanted)


def test_who_listens_to_the_model_hears_every_token(steps: list[int]) -> None:
    model = copy.deepcopy(compiled("olmo2"))
    heard: list[int] = []
    for module in (model, model.model, model.model.layers[1]):
        handle = module.register_forward_hook(lambda *_: heard.append(1))
        model.generate(**inputs_of("olmo2", 1, 7), **LENGTH, do_sample=False)
        handle.remove()
    assert len(heard) == 36
    assert not steps


def test_a_call_of_the_callers_own_is_called(steps: list[int]) -> None:
    model = copy.deepcopy(compiled("olmo2"))
    calls: list[int] = []
    forward = model.forward

    @functools.wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    model.forward = counted
    model.generate(**inputs_of("olmo2", 1, 7), **LENGTH, do_sample=False)
    assert len(calls) == 12
    assert not steps


def test_a_copy_generates_by_itself(steps: list[int]) -> None:
    model = compiled("olmo2")
    twin = copy.deepcopy(model)
    assert twin.generate.__self__ is twin
    with torch.no_grad():
        twin.model.norm.weight.zero_()
    given = inputs_of("olmo2", 1, 7)
    assert (twin.generate(**given, **LENGTH, do_sample=False)[:, 7:] == 0).all()
    assert (model.generate(**given, **LENGTH, do_sample=False)[:, 7:] != 0).any()


def test_a_conversation_goes_on_with_its_cache(steps: list[int]) -> None:
    from transformers import DynamicCache

    from hf_sparse.upstream.transformers.caches import cache_name

    model, given = compiled("olmo2"), inputs_of("olmo2", 1, 7)
    name = cache_name(model.forward)
    results = []
    for call in (functools.partial(by_transformers, model), model.generate):
        cache = DynamicCache()
        first = call(**given, **LENGTH, do_sample=False, **{name: cache})
        more = torch.cat([first, torch.tensor([[5, 6, 7]])], dim=1)
        results.append(
            call(
                input_ids=more,
                attention_mask=torch.ones_like(more),
                **LENGTH,
                do_sample=False,
                **{name: cache},
            )
        )
    assert torch.equal(*results)
    assert steps


def test_a_class_with_a_forward_of_its_own_is_called_for_every_token(steps: list[int]) -> None:
    original = model_of("olmo2", AutoModelForCausalLM)

    class Louder(type(original)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = -output.logits
            return output

    original.__class__ = Louder
    model, given = hf_sparse.compile(original), inputs_of("olmo2", 1, 7)
    wanted = by_transformers(model, **given, **LENGTH, do_sample=False)
    assert torch.equal(model.generate(**given, **LENGTH, do_sample=False), wanted)
    assert not steps


def test_rotations_that_change_with_the_length_are_left_to_transformers(steps: list[int]) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    original = model_of(
        "olmo2", AutoModelForCausalLM, rope_parameters=rope, max_position_embeddings=8
    )
    model, given = hf_sparse.compile(original), inputs_of("olmo2", 1, 7)
    wanted = original.generate(**given, **LENGTH, do_sample=False)
    assert torch.equal(model.generate(**given, **LENGTH, do_sample=False), wanted)
    assert not steps


def test_a_hook_on_every_module_is_heard(steps: list[int]) -> None:
    heard: list[int] = []
    model = compiled("olmo2")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: heard.append(1))
    try:
        model.generate(**inputs_of("olmo2", 1, 7), **LENGTH, do_sample=False)
    finally:
        handle.remove()
    assert heard
    assert not steps
