"""What the kernels compute, in float64, and the weight that a packed one stands for."""

from __future__ import annotations

import numpy as np

from hf_sparse.runtime.kernels.attention import UNSEEN
from hf_sparse.runtime.kernels.shuffled_rows import UNITS
from hf_sparse.runtime.kernels.single_token import COLUMNS, GROUP
from hf_sparse.runtime.kernels.weight_types import type_of
from hf_sparse.runtime.weights.rows import DecodeWeight
from hf_sparse.runtime.weights.shuffled import ShuffledWeight, lane_places


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


def scored_attention_ref(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    added: np.ndarray,
    scale: float,
    cap: float,
    seen: np.ndarray,
) -> np.ndarray:
    """Attention of one head, with a cap, a mask and a bias.

    Args:
        q: `(queries, head_dim)`.
        k, v: `(keys, head_dim)`.
        added: mask and bias, `(queries, keys)`.
        scale, cap: as the kernel's.
        seen: which keys a query sees, `(queries, keys)`.
    """
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    scores = scale * q @ k.T
    scores = cap * np.tanh(scores / cap) if cap else scores
    scores = np.where(seen, scores + added, UNSEEN)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True) @ v)


def unpack_shuffled(packed: ShuffledWeight) -> np.ndarray:
    """The weight that was packed, `(rows, columns)` float32."""
    window, (groups, windows, _, _) = packed.window, packed.values.shape

    def rows(array: np.ndarray) -> np.ndarray:
        ordered = array.reshape(groups, windows, UNITS, window.unit_rows, window.kept)
        return ordered.transpose(0, 2, 3, 1, 4).reshape(-1, windows, window.kept)

    values = rows(type_of(packed.values).widen(packed.values))
    places = rows(lane_places(packed)).astype(np.intp)
    weight = np.zeros((len(values), windows, window.columns), np.float32)
    for lane in range(window.kept):  # lanes without a weight add 0 to the first column
        place = places[..., lane, None]
        added = np.take_along_axis(weight, place, -1) + values[..., lane, None]
        np.put_along_axis(weight, place, added, -1)
    return weight.reshape(len(values), -1)[: packed.rows, : packed.columns]


def route_ref(logits: np.ndarray, chosen: int, *, normalised: bool) -> np.ndarray:
    """The weights of experts, `(experts, tokens)`, of logits of this shape."""
    logits = logits.astype(np.float64)
    weights = np.exp(logits - logits.max(axis=0))
    weights /= weights.sum(axis=0)
    largest = np.argsort(-logits, axis=0, kind="stable")[:chosen]
    found = np.zeros_like(weights)
    np.put_along_axis(found, largest, np.take_along_axis(weights, largest, 0), 0)
    return np.asarray(found / found.sum(axis=0) if normalised else found)
