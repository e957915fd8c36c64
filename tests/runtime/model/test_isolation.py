"""No sequence depends on another one, on what lay in memory, or on the calls before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.runtime.programs import tile_buffers
from hf_sparse.runtime.weights.memory import aligned
from tests.support.few_bits import INT4, quantised
from tests.support.tiny_models import tiny_model

FAMILIES = ["llama", "gpt2", "opt", "qwen3", "bert", "albert"]
TOKENS = 21


def compiled(family: str) -> Any:
    model = tiny_model(family)
    hf_sparse.prune_(model, SparsityConfig("unstructured", 0.6), "magnitude")
    return hf_sparse.compile(model)


def states(model: Any, embeds: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(inputs_embeds=embeds, output_hidden_states=True, **options)
    return found.hidden_states[-1]


def embeddings(model: Any, batch: int = 3, tokens: int = TOKENS) -> torch.Tensor:
    width = model.get_input_embeddings().weight.shape[1]
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.few(3)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e38, 1e-42])
def test_no_sequence_sees_its_neighbours(family: str, poison: float) -> None:
    model = compiled(family)
    plain = embeddings(model)
    wanted = states(model, plain)
    poisoned = plain.clone()
    poisoned[1] = poison
    found = states(model, poisoned)
    for row in (0, 2):
        torch.testing.assert_close(found[row], wanted[row], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_no_token_sees_the_tokens_behind_it(family: str) -> None:
    """Finite ones: a weight of 0 times NaN is NaN, here as in torch."""
    model = compiled(family)
    plain = embeddings(model)
    wanted = states(model, plain)
    poisoned = plain.clone()
    poisoned[:, 11:] = -1e4
    found = states(model, poisoned)
    torch.testing.assert_close(found[:, :11], wanted[:, :11], rtol=1e-6, atol=1e-7)


@pytest.mark.few(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_memory_before_is_read(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that hold NaN before the first call give what buffers of zeros give."""
    model = compiled(family)
    plain = embeddings(model)
    wanted = states(model, plain)

    def dirty(*shape: int) -> torch.Tensor:
        return aligned(*shape).fill_(float("nan"))

    monkeypatch.setattr(tile_buffers, "aligned", dirty)
    found = states(compiled(family), plain)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_codes_read_nothing_of_the_memory_before(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = embeddings(tiny_model("llama"))
    wanted = states(hf_sparse.compile(quantised(), bits=4), plain)

    def dirty(*shape: int) -> torch.Tensor:
        return aligned(*shape).fill_(float("nan"))

    monkeypatch.setattr(tile_buffers, "aligned", dirty)
    found = states(hf_sparse.compile(quantised(INT4), bits=4), plain)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_calls_before_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt and a token of a model that has just computed NaN give what a fresh model gives."""

    def both(model: Any, batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            first = model(inputs_embeds=batch, use_cache=True)
            second = model(inputs_embeds=batch[:, :1], past_key_values=first.past_key_values)
        return torch.cat([first.logits, second.logits], dim=1)

    fresh, used = compiled(family), compiled(family)
    plain = embeddings(fresh)
    both(used, torch.full_like(plain, float("nan")))
    for tokens in (1, 33, 5):
        both(used, embeddings(used, batch=2, tokens=tokens))
    torch.testing.assert_close(both(used, plain), both(fresh, plain), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_threads_change_no_more_than_rounding(family: str) -> None:
    model = compiled(family)
    plain = embeddings(model)
    wanted = states(model, plain)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            found = states(model, plain)
        finally:
            torch.set_num_threads(1)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
