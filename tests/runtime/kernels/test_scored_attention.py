"""Attention with caps, biases and windows on both sides, against its reference; and sums."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from hf_sparse.runtime.kernels import addition, scored_attention
from hf_sparse.runtime.kernels.attention import UNSEEN
from hf_sparse.runtime.kernels.call import run
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.llvm.jit import Code, compile_kernels
from hf_sparse.runtime.weights.memory import aligned
from tests.runtime.kernels.test_kernels import call_attention, key_tiles
from tests.support.crosses import cross
from tests.support.kernel_references import scored_attention_ref


@pytest.fixture(scope="module")
def code(chosen: target.Target) -> Code:
    functions = [*scored_attention.functions(chosen), addition.add(chosen)]
    return compile_kernels(functions, chosen, None)


CASES = [
    # head_dim, keys, first query, window, ahead, cap, biased
    (4, 1, 0, 1 << 30, 1 << 29, 0.0, True),
    (32, 77, 13, 1 << 30, 0, 1.5, False),
    (80, 130, 70, 17, 16, 0.0, False),
    (64, 200, 100, 9, 8, 30.0, True),
    (8, 64, 0, 64, 0, 0.02, False),
]


def expected(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray,
    case: tuple,
    bias: np.ndarray,
) -> np.ndarray:
    """What the queries attend to; `bias` by distance, 0 in the middle."""
    dim, tokens, first, window, ahead, cap, biased = case
    query, key = first + np.arange(len(q))[:, None], np.arange(tokens)
    seen = (key <= query + ahead) & (key > query - window)
    added = mask[:tokens] + (bias[query - key + len(bias) // 2] if biased else 0)
    return scored_attention_ref(q, keys[0], values[0], added, dim**-0.5, cap, seen)


@cross("vectors, case", [1, 2, 4], [(case,) for case in CASES])
def test_scored_attention(code: Code, chosen: target.Target, vectors: int, case: tuple) -> None:
    dim, tokens, first, window, ahead, cap, biased = case
    width = vectors * chosen.lanes
    random = np.random.default_rng(tokens)
    keys, values = random.standard_normal((2, 1, tokens, dim)).astype(np.float32)
    tiles, table = key_tiles(keys, values, chosen.widths[0])
    mask = np.zeros(len(tiles) * chosen.widths[0], np.float32)
    mask[1:tokens:5] = UNSEEN
    bias = random.standard_normal(1024).astype(np.float32)
    q = aligned(dim, width)
    q.copy_(torch.from_numpy(random.standard_normal((dim, width))))
    out = call_attention(
        code,
        partial(scored_attention.SIGNATURE.operation, scored_attention.name(vectors)),
        q,
        dim,
        **{"head_dim": dim, "scale": dim**-0.5, "cap": cap},
        **{"table": table, "key_tiles": len(table), "mask": mask, "key_count": tokens},
        **{"first_query": first, "window": window, "ahead": ahead},
        bias=bias.ctypes.data + 4 * 512 if biased else 0,
    )
    wanted = expected(q.T.numpy(), keys, values, mask, case, bias)
    sees = (
        first + np.arange(width) - window + 1 < tokens
    )  # a query that sees nothing gives anything
    np.testing.assert_allclose(out.T.numpy()[sees], wanted[sees], atol=4e-6)


@pytest.mark.parametrize("case", CASES)
def test_scored_attention_of_one_token(code: Code, chosen: target.Target, case: tuple) -> None:
    dim, tokens, _, window, _, cap, biased = case
    random = np.random.default_rng(tokens)
    keys, values = random.standard_normal((2, 1, tokens, dim)).astype(np.float32)
    width = chosen.widths[0]
    tiles, table = key_tiles(keys, values, width)
    mask = np.zeros(len(tiles) * width, np.float32)
    mask[1:tokens:5] = UNSEEN
    bias = random.standard_normal(1024).astype(np.float32)
    behind = bias[::-1].copy()  # by how far a key is behind the query, 0 at 511
    q, scores = aligned(dim), aligned(len(mask))
    q.copy_(torch.from_numpy(random.standard_normal(dim)))
    out = call_attention(
        code,
        partial(scored_attention.ROW.operation, "scored_row"),
        q,
        dim,
        **{"head_dim": dim, "scale": dim**-0.5, "cap": cap},
        **{"table": table, "width": width, "mask": mask, "key_count": tokens},
        **{"window": window, "scores": scores},
        bias=behind.ctypes.data + 4 * 511 if biased else 0,
    )
    last = (dim, tokens, tokens - 1, window, 0, cap, biased)
    wanted = expected(q[None].numpy(), keys, values, mask, last, bias)
    np.testing.assert_allclose(out[None].numpy(), wanted, atol=4e-6)


def test_the_cap_is_never_passed_and_small_scores_stay(code: Code, chosen: target.Target) -> None:
    """Scores far above the cap weigh alike; below it they are as without one."""
    found = []
    for cap, scale in ((1e-3, 1e4), (1e4, 1.0), (0.0, 1.0)):
        keys = np.linspace(1, 2, 40, dtype=np.float32).reshape(1, 10, 4)
        values = np.arange(40, dtype=np.float32).reshape(1, 10, 4)
        tiles, table = key_tiles(keys, values, chosen.widths[0])
        mask = np.zeros(len(tiles) * chosen.widths[0], np.float32)
        q, out = aligned(4, chosen.lanes), aligned(4, chosen.lanes)
        q.fill_(0.5)
        arguments = {"k_first": 0, "v_first": 4, "key_tiles": len(table), "key_count": 10}
        operation = scored_attention.SIGNATURE.operation(
            scored_attention.name(1),
            q=q.data_ptr(),
            out=out.data_ptr(),
            head_dim=4,
            table=table.ctypes.data,
            mask=mask.ctypes.data,
            first_query=0,
            window=1 << 30,
            ahead=1 << 29,
            scale=scale,
            cap=cap,
            bias=0,
            **arguments,
        )
        run(code, operation)
        found.append(out[:, 0].numpy().copy())
    np.testing.assert_allclose(found[0], values[0].mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(found[1], found[2], rtol=1e-3)


def test_add(code: Code, chosen: target.Target) -> None:
    x, y = (aligned(3 * chosen.lanes) for _ in range(2))
    x.copy_(torch.arange(len(x)))
    y.fill_(2)
    place, more = x.data_ptr(), y.data_ptr()
    run(code, addition.SIGNATURE.operation("add", x=place, y=more, vectors=2))
    wanted = torch.arange(len(x)) * (torch.arange(len(x)) < 2 * chosen.lanes) + 2.0
    assert torch.equal(y, wanted)
