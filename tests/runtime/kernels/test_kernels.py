"""Every kernel against its reference, on all targets and over one table of sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from hf_sparse.runtime.kernels import activation, attention, normalisation, single_token, spmm
from hf_sparse.runtime.kernels import tiles as tile_kernels
from hf_sparse.runtime.kernels.all import kernels
from hf_sparse.runtime.kernels.call import Operation, Slot, run
from hf_sparse.runtime.kernels.weight_types import FLOAT32, WEIGHT_TYPES, WeightType
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.llvm.code_cache import DEFAULT_CACHE
from hf_sparse.runtime.llvm.jit import Code
from hf_sparse.runtime.programs.program import Program
from hf_sparse.runtime.weights import panel_checks, panels
from hf_sparse.runtime.weights import rows as row_packing
from hf_sparse.runtime.weights.dense_weight import DenseWeight
from hf_sparse.runtime.weights.memory import aligned
from tests.support.crosses import cross, pairwise
from tests.support.kernel_references import attention_ref, normalisation_ref, unpack_decode

TYPES = list(WEIGHT_TYPES.values())
NARROW = [kept for kept in TYPES if kept is not FLOAT32]
TARGETS = list(target.targets())
# Rows, columns: tiny, odd, more than a panel and a chunk, real.
SIZES = [(4, 1), (12, 7), (36, 129), (772, 256), (768, 768)]


@pytest.fixture
def codes(chosen: target.Target) -> Callable[[WeightType], Code]:
    return partial(kernels, chosen, DEFAULT_CACHE)


@pytest.fixture
def code(codes: Callable[[WeightType], Code]) -> Code:
    return codes(FLOAT32)


def rounded(weight: np.ndarray, kept: WeightType) -> np.ndarray:
    """The nearest values that a type can hold, in float32, some so small that they are subnormal."""
    weight = weight * np.where(np.arange(weight.shape[-1]) % 5, 1, 1e-6)
    return torch.from_numpy(weight).to(kept.dtype).float().numpy()


def address(array: np.ndarray | torch.Tensor) -> int:
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


def random_tile(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    tile = aligned(rows, width)
    return tile.copy_(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))


def sparse_weight(rows: int, columns: int, height: int, sparsity: float) -> np.ndarray:
    random = np.random.default_rng(rows + columns)
    kept = random.random((rows // height, columns)) >= sparsity
    weight = random.standard_normal((rows, columns)) * np.repeat(kept, height, axis=0)
    return weight.astype(np.float32)


def call_spmm(
    code: Code,
    packed: panels.PackedWeight,
    vectors: int,
    x: torch.Tensor,
    y: torch.Tensor,
    bias: np.ndarray,
    start: int,
) -> None:
    for chunk in range(len(packed.chunks) - 1):
        run(code, packed.operation(chunk, vectors, address(x), address(y), address(bias), start))


@pytest.mark.few(5)
@pairwise("rows, columns, height, sparsity", SIZES, spmm.UNROLL, [0.0, 0.5, 0.9, 1.0])
def test_packing_loses_nothing(rows: int, columns: int, height: int, sparsity: float) -> None:
    weight = sparse_weight(rows, columns, height, sparsity)
    packed = panels.pack(weight, height)
    assert np.array_equal(panels.unpack(packed), weight)
    assert packed.nonzeros == np.count_nonzero(weight)
    panel_checks.check(packed, FLOAT32)


@pytest.mark.parametrize("kept", NARROW, ids=lambda kept: kept.suffix)
def test_packing_of_two_bytes_loses_nothing(kept: WeightType) -> None:
    weight = rounded(sparse_weight(36, 129, 1, 0.6), kept)
    for height in spmm.UNROLL:
        packed = panels.pack(weight, height, kept)
        panel_checks.check(packed, kept)
        assert packed.values.dtype == (kept.array if height == 1 else np.float32)
        assert np.array_equal(panels.unpack(packed), weight)
    single = row_packing.pack_decode(weight, kept)
    row_packing.check_decode(single, kept)
    assert single.values.nbytes < 2 * np.count_nonzero(weight) + panels.PADDING + 1
    assert np.array_equal(unpack_decode(single), weight)
    with pytest.raises(ValueError, match="values are"):
        row_packing.check_decode(single, FLOAT32)
    with pytest.raises(ValueError, match="values are"):
        panel_checks.check(panels.pack(weight, 1, kept), FLOAT32)


@pytest.mark.few(1)
@cross("rows, columns, chosen, kept", SIZES, TARGETS, NARROW, indirect=["chosen"])
def test_two_bytes_give_what_float32_gives(
    codes: Callable[[WeightType], Code],
    chosen: target.Target,
    kept: WeightType,
    rows: int,
    columns: int,
) -> None:
    """To the last bit: tiles by `spmm` and `dense`, single tokens packed and as they are."""
    weight = rounded(sparse_weight(rows, columns, 1, 0.6), kept)
    bias = np.random.default_rng(0).standard_normal(rows).astype(np.float32)
    found: dict[WeightType, list[torch.Tensor]] = {}
    for stored in (FLOAT32, kept):
        code, results = codes(stored), []
        whole = torch.from_numpy(weight).to(stored.dtype)
        for vectors in (1, 2, 4):
            x = random_tile(columns, vectors * chosen.lanes)
            for packed in (
                panels.pack(weight, 1, stored),
                panels.pack(weight, 2, stored),
                DenseWeight(whole, 0, columns),
            ):
                y = random_tile(rows, vectors * chosen.lanes, seed=1)
                for chunk in range(len(packed.chunk_rows) - 1):
                    ends = (address(x), address(y), address(bias), spmm.START_SUM_BIAS)
                    run(code, packed.operation(chunk, vectors, *ends))
                results.append(y)
        single = row_packing.pack_decode(weight, stored)
        padded = torch.zeros(rows, -(-columns // single_token.COLUMNS) * single_token.COLUMNS)
        padded[:, :columns] = torch.from_numpy(weight)
        padded = padded.to(stored.dtype)
        x = aligned(padded.shape[1])
        x[:columns] = random_tile(1, columns)[0]
        for operation in (
            partial(
                single_token.SPARSE_ROWS.operation,
                f"sparse_rows{stored.suffix}",
                words=address(single.words),
                values=address(single.values),
                row_words=single.words.shape[1],
            ),
            partial(
                single_token.DENSE_ROWS.operation,
                f"dense_rows{stored.suffix}",
                weight=address(padded),
                row_bytes=stored.size * padded.shape[1],
                columns=padded.shape[1],
            ),
        ):
            y = aligned(rows)
            ends = {"bias": address(bias), "groups": rows // single_token.GROUP, "add": 0}
            run(code, operation(x=address(x), y=address(y), **ends))
            results.append(y)
        found[stored] = results
    for one, other in zip(found[FLOAT32], found[kept], strict=True):
        assert one.count_nonzero()
        assert torch.equal(one, other)


def results_of_starts(
    weight: np.ndarray, x: torch.Tensor, before: torch.Tensor, bias: np.ndarray
) -> dict[int, np.ndarray]:
    """What a product gives that starts with what is there, with the bias, or with both."""
    product = weight.astype(np.float64) @ x.double().numpy()
    return {
        spmm.START_SUM: before.numpy() + product,
        spmm.START_BIAS: bias[:, None] + product,
        spmm.START_SUM_BIAS: before.numpy() + bias[:, None] + product,
    }


@pairwise("rows, columns, vectors, height", SIZES, [1, 2, 4], spmm.UNROLL)
def test_spmm(
    code: Code, chosen: target.Target, rows: int, columns: int, vectors: int, height: int
) -> None:
    weight = sparse_weight(rows, columns, height, 0.8)
    packed = panels.pack(weight, height)
    x = random_tile(columns, vectors * chosen.lanes)
    before = random_tile(rows, vectors * chosen.lanes, seed=1)
    bias = np.random.default_rng(0).standard_normal(rows).astype(np.float32)
    wanted = results_of_starts(weight, x, before, bias)
    for start, reference in wanted.items():
        y = aligned(*before.shape).copy_(before)
        call_spmm(code, packed, vectors, x, y, bias, start)
        np.testing.assert_allclose(y.numpy(), reference, atol=2e-5 * columns**0.5)


@cross("rows, columns, vectors", SIZES, [1, 2, 4])
def test_dense(code: Code, chosen: target.Target, rows: int, columns: int, vectors: int) -> None:
    whole = np.random.default_rng(0).standard_normal((rows, columns + 5)).astype(np.float32)
    weight = whole[:, 2 : 2 + columns]
    x = random_tile(columns, vectors * chosen.lanes)
    before = random_tile(rows, vectors * chosen.lanes, seed=1)
    bias = np.random.default_rng(0).standard_normal(rows).astype(np.float32)
    wanted = results_of_starts(weight, x, before, bias)
    packed = DenseWeight(torch.from_numpy(whole), 2, columns)
    for start, reference in wanted.items():
        y = aligned(*before.shape).copy_(before)
        for chunk in range(len(packed.chunk_rows) - 1):
            run(
                code, packed.operation(chunk, vectors, address(x), address(y), address(bias), start)
            )
        np.testing.assert_allclose(y.numpy(), reference, atol=2e-5 * columns**0.5)


def test_spmm_of_a_permuted_weight_permutes_the_result(code: Code, chosen: target.Target) -> None:
    weight = sparse_weight(64, 300, 1, 0.7)
    order = np.random.default_rng(1).permutation(64)
    x = random_tile(300, chosen.lanes)
    results = []
    for matrix in (weight, weight[order]):
        y = aligned(64, chosen.lanes)
        call_spmm(code, panels.pack(matrix), 1, x, y, np.zeros(64, np.float32), spmm.START_BIAS)
        results.append(y.numpy())
    assert np.array_equal(results[0][order], results[1])


@pytest.mark.parametrize("name", activation.ACTIVATIONS)
def test_activation(code: Code, chosen: target.Target, name: str) -> None:
    unit = chosen.lanes * activation.UNROLL
    x, gate = aligned(64 * unit), random_tile(64, unit).view(-1)
    x.copy_(torch.linspace(-12, 12, len(x)))
    reference = activation.activation_ref(name, x.numpy())
    both = x.clone(), aligned(len(x)).copy_(x)
    vectors = len(x) // chosen.lanes
    places = {"x": address(both[1]), "y": address(both[1])}
    run(code, activation.SIGNATURE.operation(name, **places, vectors=vectors))
    np.testing.assert_allclose(both[1].numpy(), reference, atol=2e-6)
    gated = aligned(len(x)).copy_(x)
    places = {"x": address(gated), "y": address(gate)}
    run(code, activation.SIGNATURE.operation(f"{name}_gate", **places, vectors=vectors))
    np.testing.assert_allclose(gated.numpy(), reference * gate.numpy(), atol=2e-5)


def normalised(
    code: Code, kernel: str, x: torch.Tensor, y: torch.Tensor, features: int
) -> np.ndarray:
    """Normalise two groups of features from `x` to `y`, with the weights and biases returned."""
    parameters = np.random.default_rng(0).standard_normal((2, features)).astype(np.float32)
    weight, bias = map(address, parameters)
    operation = normalisation.SIGNATURE.operation(
        kernel,
        **{"x": address(x), "y": address(y), "features": features, "groups": 2},
        **{"weight": weight, "bias": bias, "epsilon": 1e-5},
    )
    run(code, operation)
    return parameters


@pairwise("features, norm, vectors", [1, 37, 768], normalisation.NORMS, [1, 2, 4])
def test_normalisation(
    code: Code, chosen: target.Target, features: int, norm: str, vectors: int
) -> None:
    x = random_tile(2 * features, vectors * chosen.lanes) + 3
    x = aligned(*x.shape).copy_(x)
    y = aligned(*x.shape)
    weight, bias = normalised(code, normalisation.name(norm, vectors), x, y, features)
    for half in range(2):
        rows = slice(half * features, (half + 1) * features)
        wanted = normalisation_ref(norm, x[rows].numpy(), weight, bias, 1e-5)
        np.testing.assert_allclose(y[rows].numpy(), wanted, atol=3e-5, rtol=1e-5)


@cross("features, missing, vectors", [(1, 0), (37, 3), (128, 1)], [1, 2, 4])
def test_tiles_transpose_and_come_back(
    code: Code, chosen: target.Target, features: int, missing: int, vectors: int
) -> None:
    width = vectors * chosen.lanes
    tokens = width - missing
    x = torch.randn(tokens, features)
    tile, back = aligned(features, width), torch.full((tokens, features), torch.nan)
    sizes = {"features": features, "tokens": tokens, "stride": 4 * features}
    name = f"to_tile{vectors}"
    run(code, tile_kernels.TRANSPOSE.operation(name, x=address(x), y=address(tile), **sizes))
    assert torch.equal(tile[:, :tokens], x.T)
    assert torch.equal(tile[:, tokens:], x[-1:].T.expand(-1, missing))
    name = f"from_tile{vectors}"
    run(code, tile_kernels.TRANSPOSE.operation(name, x=address(tile), y=address(back), **sizes))
    assert torch.equal(back, x)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`x (heads, head_dim, tokens)`."""
    half = x.shape[1] // 2
    turned = torch.cat([-x[:, half:], x[:, :half]], dim=1)
    return x * cos + turned * sin


@pytest.mark.parametrize("vectors", [1, 4])
def test_rotary(code: Code, chosen: target.Target, vectors: int) -> None:
    width = vectors * chosen.lanes
    x, cos, sin = random_tile(3 * 20, width), random_tile(20, width, 1), random_tile(20, width, 2)
    wanted = rotated(x.view(3, 20, width), cos, sin).view(60, width)
    angles = {"cos": address(cos), "sin": address(sin)}
    run(
        code,
        tile_kernels.ROTARY.operation(
            f"rotary{vectors}", x=address(x), heads=3, head_dim=20, **angles
        ),
    )
    torch.testing.assert_close(x, wanted)


def key_tiles(
    keys: np.ndarray, values: np.ndarray, width: int
) -> tuple[list[torch.Tensor], np.ndarray]:
    """Keys and values `(heads, tokens, head_dim)` as tiles of `width` tokens, and their table."""
    heads, tokens, dim = keys.shape
    tiles = []
    for start in range(0, tokens, width):
        tile = aligned(2 * heads * dim, width)
        for half, source in enumerate((keys, values)):
            part = source[:, start : start + width].transpose(0, 2, 1).reshape(heads * dim, -1)
            rows = slice(half * heads * dim, (half + 1) * heads * dim)
            tile[rows, : part.shape[1]] = torch.from_numpy(part)
        tiles.append(tile)
    return tiles, np.array([(address(tile), 4 * width, width) for tile in tiles], np.int64)


ATTENTION = [
    # heads, heads of keys, head_dim, keys, causal, window
    (2, 2, 4, 1, False, None),
    (4, 2, 32, 77, True, None),
    (3, 1, 80, 130, True, 17),
    (2, 2, 64, 128, False, None),
    (1, 1, 96, 333, True, None),
    (2, 1, 128, 64, True, 64),
]


def call_attention(
    code: Code, operation: Callable[..., Operation], q: torch.Tensor, rows: int, **others: Any
) -> torch.Tensor:
    """The result for queries `q`; keys begin at row 0 of their tiles, values at `rows`."""
    out = aligned(*q.shape)
    places = {name: address(value) for name, value in others.items() if hasattr(value, "shape")}
    numbers = {**others, **places, "k_first": 0, "v_first": rows}
    run(code, operation(q=address(q), out=address(out), **numbers))
    return out


@cross("vectors, case", [1, 2, 4], [(case,) for case in ATTENTION])
def test_attention(code: Code, chosen: target.Target, vectors: int, case: tuple) -> None:
    heads, key_heads, dim, tokens, causal, window = case
    width = vectors * chosen.lanes
    random = np.random.default_rng(tokens)
    keys, values = random.standard_normal((2, key_heads, tokens, dim)).astype(np.float32)
    tiles, table = key_tiles(keys, values, chosen.widths[0])
    mask = np.zeros(len(tiles) * chosen.widths[0], np.float32)
    mask[1:tokens:5] = attention.UNSEEN
    q = random_tile(heads * dim, width)
    first = max(tokens - width, 0) if causal else 1 << 29
    window = window or 1 << 30
    group = heads // key_heads
    out = call_attention(
        code,
        partial(attention.SIGNATURE.operation, attention.name(vectors)),
        q,
        key_heads * dim,
        **{"heads": heads, "head_dim": dim, "group": group, "scale": dim**-0.5},
        **{"table": table, "key_tiles": len(table), "mask": mask, "key_count": tokens},
        **{"first_query": first, "window": window},
    )
    wanted = attention_ref(
        q.view(heads, dim, width).transpose(1, 2).numpy(),
        np.repeat(keys, group, 0),
        np.repeat(values, group, 0),
        mask[:tokens],
        dim**-0.5,
        first,
        window,
    )
    found = out.view(heads, dim, width).transpose(1, 2).numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_of_one_token(code: Code, chosen: target.Target, case: tuple) -> None:
    heads, key_heads, dim, tokens, _, window = case
    random = np.random.default_rng(tokens)
    keys, values = random.standard_normal((2, key_heads, tokens, dim)).astype(np.float32)
    width = chosen.widths[0]
    tiles, table = key_tiles(keys, values, width)
    mask = np.zeros(len(tiles) * width, np.float32)
    mask[1:tokens:5] = attention.UNSEEN
    q = aligned(heads * dim)
    q.copy_(torch.from_numpy(random.standard_normal(heads * dim)))
    scores, window, group = aligned(len(mask)), window or 1 << 30, heads // key_heads
    out = call_attention(
        code,
        partial(single_token.ATTENTION.operation, "attention_row"),
        q,
        key_heads * dim,
        **{"heads": heads, "head_dim": dim, "group": group, "scale": dim**-0.5},
        **{"table": table, "width": width, "mask": mask, "key_count": tokens},
        **{"window": window, "scores": scores},
    )
    wanted = attention_ref(
        q.view(heads, 1, dim).numpy(),
        np.repeat(keys, group, 0),
        np.repeat(values, group, 0),
        mask[:tokens],
        dim**-0.5,
        tokens - 1,
        window,
    )
    np.testing.assert_allclose(out.view(heads, 1, dim).numpy(), wanted, atol=2e-6)


@pairwise("add, rows, columns, sparsity", [False, True], SIZES, [0.0, 0.5, 1.0])
def test_rows_of_one_token(code: Code, rows: int, columns: int, sparsity: float, add: bool) -> None:
    weight = sparse_weight(rows, columns, 1, sparsity)
    packed = row_packing.pack_decode(weight)
    assert np.array_equal(unpack_decode(packed), weight)
    whole = -(-columns // single_token.COLUMNS) * single_token.COLUMNS
    x = aligned(whole)
    x[:columns] = torch.randn(columns)
    bias = torch.randn(rows)
    y = torch.randn(rows)
    wanted = weight.astype(np.float64) @ x[:columns].numpy() + bias.numpy()
    wanted = wanted + y.numpy() if add else wanted
    padded = np.zeros((rows, whole), np.float32)
    padded[:, :columns] = weight
    second = y.clone()
    common = {
        "x": address(x),
        "bias": address(bias),
        "groups": rows // single_token.GROUP,
        "add": int(add),
    }
    run(
        code,
        single_token.SPARSE_ROWS.operation(
            "sparse_rows",
            words=address(packed.words),
            values=address(packed.values),
            row_words=packed.words.shape[1],
            y=address(y),
            **common,
        ),
    )
    run(
        code,
        single_token.DENSE_ROWS.operation(
            "dense_rows",
            weight=address(padded),
            row_bytes=4 * whole,
            columns=whole,
            y=address(second),
            **common,
        ),
    )
    for found in (y, second):
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5 * whole**0.5)


@pytest.mark.parametrize("norm", normalisation.NORMS)
def test_norm_and_rotary_of_one_token(code: Code, chosen: target.Target, norm: str) -> None:
    features = 3 * chosen.lanes
    x, y = aligned(2, features).copy_(torch.randn(2, features)), aligned(2, features)
    weight, bias = normalised(code, f"{norm}_norm_row", x, y, features)
    wanted = normalisation_ref(norm, x.T.numpy(), weight, bias, 1e-5)
    np.testing.assert_allclose(y.T.numpy(), wanted, atol=1e-5)
    q, cos, sin = torch.randn(3, 6), torch.randn(6), torch.randn(6)
    turned = rotated(q[..., None], cos[:, None], sin[:, None])[..., 0]
    angles = {"cos": address(cos), "sin": address(sin)}
    run(
        code,
        tile_kernels.ROTARY.operation("rotary_row", x=address(q), heads=3, head_dim=6, **angles),
    )
    torch.testing.assert_close(q, turned)


def test_append_and_copy(code: Code, chosen: target.Target) -> None:
    width = chosen.widths[0]
    x = random_tile(6, width)
    tiles = [aligned(8, width), aligned(8, width)]
    table = np.array([(address(tile), 4 * width, width) for tile in tiles], np.int64)
    position = width - 2
    run(
        code,
        tile_kernels.APPEND.operation(
            "append",
            x=address(x),
            features=6,
            tokens=5,
            row_bytes=4 * width,
            table=address(table),
            first=1,
            position=position,
            width=width,
        ),
    )
    both = torch.cat(tiles, dim=1)
    assert torch.equal(both[1:7, position : position + 5], x[:, :5])
    assert both.count_nonzero() == 30
    run(code, tile_kernels.COPY.operation("copy", x=address(x), y=address(tiles[0]), vectors=6 * 4))
    assert torch.equal(tiles[0][:6], x)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_program_runs_its_phases_in_order(
    code: Code, chosen: target.Target, threads: int
) -> None:
    """Each phase copies what the one before wrote, in another thread's list."""
    vectors, phases = 4, 6
    rows = [aligned(threads, vectors * chosen.lanes) for _ in range(phases + 1)]
    source = random_tile(threads, vectors * chosen.lanes)
    listed = []
    for phase in range(phases):
        lists = []
        for thread in range(threads):
            moved = (thread + 1) % threads
            x = Slot("x", 4 * vectors * chosen.lanes * moved)
            given = x if phase == 0 else address(rows[phase][moved])
            goal = address(rows[phase + 1][thread])
            lists.append([tile_kernels.COPY.operation("copy", x=given, y=goal, vectors=vectors)])
        listed.append(lists)
    program = Program(code, listed, [rows])
    for _ in range(20):
        rows[-1].zero_()
        program.run(x=address(source))
        assert torch.equal(rows[-1], source.roll(-phases, dims=0))
