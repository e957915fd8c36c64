"""Caches of keys and values: transformers' classes, and what its releases name differently."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

__all__ = [
    "CACHE_NAMES",
    "Cache",
    "CacheLayerMixin",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "EncoderDecoderCache",
    "cache_in",
    "cache_name",
    "own_cache",
]

# The argument of a model's forward, and the field of its outputs, that hold keys and values:
# `cache` since transformers 5.24, which takes the older name with a warning until 5.40.
CACHE_NAMES = ("cache", "past_key_values")
# What some families' blocks call it.
_OF_BLOCKS = "layer_past"


def cache_name(forward: Callable[..., Any]) -> str:
    """The name of the argument by which a model's forward takes its cache of keys and values."""
    arguments = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in arguments), CACHE_NAMES[-1])


def cache_in(values: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model or a block, or among its outputs; None without one."""
    names = (*CACHE_NAMES, _OF_BLOCKS)
    caches = (values[name] for name in names if values.get(name) is not None)
    return next(caches, None)


def own_cache(cache: Any) -> Any:
    """The part of a cache that has the keys of a decoder's own tokens; all of it without an encoder."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
