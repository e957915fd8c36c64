"""What stands in for the private steps of transformers' `generate`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GenerationConfig

from hf_sparse.upstream.transformers import generation
from tests.support.tiny_models import tiny_model

IDS = torch.tensor([[3, 4, 5, 6]])


def test_the_mode_of_a_call_is_told_from_its_settings() -> None:
    plain = generation.takes_one_token_after_the_other
    assert plain(GenerationConfig(), None)
    assert plain(GenerationConfig(do_sample=True), None)
    assert not plain(GenerationConfig(num_beams=2), None)
    assert not plain(GenerationConfig(), tiny_model("llama"))


def test_settings_are_the_options_then_the_configs_then_the_models() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.generation_config.num_beams = 3
    model.generation_config.top_k = 7
    config = GenerationConfig(top_k=9)
    merged = generation.merged_config(model, config, {"do_sample": True, "max_new_tokens": 2})
    assert (merged.num_beams, merged.top_k, merged.do_sample) == (3, 9, True)
    assert generation.merged_config(model, None, {}).top_k == 7
    assert config.num_beams in (None, 1)


def test_the_steps_are_those_of_generate() -> None:
    """A loop that `generate` is given meets what ours uses; transformers' loop goes on from it."""
    model, met = tiny_model("llama"), {}

    def loop(model: Any, input_ids: Any, **given: Any) -> Any:
        settings = dict(given)
        config = settings.pop("generation_config")
        rest = {k: v for k, v in settings.items() if not k.endswith(("processor", "criteria"))}
        met["logits"] = generation.prefill(model, input_ids, config, rest).logits
        met["padding"] = generation.padding_token(config)
        fresh = {k: v for k, v in given.items() if k not in ("cache", "past_key_values")}
        return generation.sample(model, input_ids, {**fresh, "use_cache": False})

    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 1}
    wanted = model.generate(IDS, **options)
    found = model.generate(IDS, **options, custom_generate=loop)
    assert torch.equal(found, wanted)
    assert int(met["logits"][0, -1].argmax()) == int(wanted[0, 4])
    assert int(met["padding"]) == 1


def test_a_model_generates_as_usual_unless_it_has_steps_of_its_own() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    assert generation.generates_as_usual(model)
    model.prepare_inputs_for_generation = model.prepare_inputs_for_generation
    assert not generation.generates_as_usual(model)

    class Own(type(tiny_model("llama"))):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            return super().prepare_inputs_for_generation(*args, **kwargs)

    other = copy.deepcopy(tiny_model("llama"))
    other.__class__ = Own
    assert not generation.generates_as_usual(other)
