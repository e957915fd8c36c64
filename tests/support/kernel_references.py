"""What the kernels compute, in float64, and the weight that a packed one stands for."""

from __future__ import annotations

import numpy as np

from hf_sparse.runtime.kernels.attention import UNSEEN
from hf_sparse.runtime.kernels.single_token import COLUMNS, GROUP
from hf_sparse.runtime.kernels.weight_types import type_of
from hf_sparse.runtime.weights.rows import DecodeWeight


def attention_ref(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray,
    scale: float,
    first_query: int,
    window: int,
) -> np.ndarray:
    """Attention of `q (heads, queries, head_dim)`, `k`, `v (heads, keys, head_dim)`."""
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    scores = scale * q @ k.swapaxes(1, 2) + mask
    query = first_query + np.arange(q.shape[1])[:, None]
    key = np.arange(k.shape[1])
    seen = (key <= query) & (key > query - window)
    scores = np.where(seen, scores, UNSEEN)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True) @ v)


def normalisation_ref(
    norm: str, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float
) -> np.ndarray:
    """A norm of `x (features, tokens)`."""
    x = x.astype(np.float64)
    if norm == "layer":
        x = x - x.mean(axis=0)
    x = x / np.sqrt((x * x).mean(axis=0) + epsilon) * weight[:, None]
    return np.asarray(x + bias[:, None] if norm == "layer" else x)


def unpack_decode(packed: DecodeWeight) -> np.ndarray:
    """The weight that was packed, `(rows, columns)` float32."""
    groups, words = packed.words.shape
    bits = np.unpackbits(packed.words.view(np.uint8), bitorder="little").astype(bool)
    ordered = np.zeros(bits.size, np.float32)
    ordered[bits] = type_of(packed.values).widen(packed.values[: np.count_nonzero(bits)])
    weight = ordered.reshape(groups, words, GROUP, COLUMNS).swapaxes(1, 2)
    return weight.reshape(groups * GROUP, -1)[: packed.rows, : packed.columns]
