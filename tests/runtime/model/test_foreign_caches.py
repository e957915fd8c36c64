"""Caches that do something of their own are refused: machine code writes keys and values itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import hf_sparse
from tests.support.tiny_models import tiny_model

IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def compiled(model: PreTrainedModel) -> PreTrainedModel:
    return hf_sparse.compile(model)


class Forgetting(DynamicLayer):
    """A layer that keeps the last tokens only."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        super().update(*args, **kwargs)
        self.keys, self.values = self.keys[:, :, -4:], self.values[:, :, -4:]
        return self.keys, self.values


class Scaling(DynamicCache):
    """A cache that changes keys."""

    def update(self, keys: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(2 * keys, *args, **kwargs)


def of_layers() -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [Forgetting() for _ in range(3)]
    return cache


def patched() -> DynamicCache:
    cache = DynamicCache()
    before = cache.update
    cache.update = lambda keys, *args, **kwargs: before(2 * keys, *args, **kwargs)
    return cache


def patched_layer() -> DynamicCache:
    cache = DynamicCache()
    layer = DynamicLayer()
    before = layer.update
    layer.update = lambda keys, *args, **kwargs: before(2 * keys, *args, **kwargs)
    cache.layers = [layer]
    return cache


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (of_layers, "has a Forgetting; a compiled model needs a DynamicCache"),
        (patched_layer, "has a DynamicLayer; a compiled model needs a DynamicCache"),
        (Scaling, "is a Scaling with an update of its own"),
        (patched, "is a DynamicCache with an update of its own"),
    ],
)
def test_what_a_cache_does_itself_is_not_lost(make: Any, match: str, compiled: Any) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=match):
        compiled(input_ids=IDS, past_key_values=make())


def test_layers_with_different_numbers_of_tokens_are_refused(model: Any, compiled: Any) -> None:
    with torch.no_grad():
        filled = DynamicCache(config=model.config)
        model(input_ids=IDS, past_key_values=filled)
        filled.layers[1].crop(-2)
        own = DynamicCache(config=model.config)
        compiled(input_ids=IDS, past_key_values=own)
        own.layers[1].crop(-2)
        for cache in (filled, own):
            with pytest.raises(ValueError, match=r"hold \[12, 10, 12\] tokens"):
                compiled(input_ids=IDS[:, :1], past_key_values=cache)
        own.layers[0].crop(-2)
        own.layers[2].crop(-2)
        wanted = model(input_ids=torch.cat([IDS[:, :10], IDS[:, 3:4]], dim=1)).logits[:, -1:]
        found = compiled(input_ids=IDS[:, 3:4], past_key_values=own).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


def test_a_subclass_that_changes_nothing_is_taken(model: Any, compiled: Any) -> None:
    class Mine(DynamicCache):
        pass

    cache = Mine()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        parts = [compiled(input_ids=part, past_key_values=cache).logits for part in IDS.split(6, 1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, atol=1e-4, rtol=1e-3)
