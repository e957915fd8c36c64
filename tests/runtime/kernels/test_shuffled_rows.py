"""One token times N:M weights by shuffling x: against float64, on all targets, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

import hf_sparse
from hf_sparse.formats import FormatError
from hf_sparse.runtime.kernels.all import kernels
from hf_sparse.runtime.kernels.shuffled_rows import WINDOWS, Window
from hf_sparse.runtime.kernels.weight_types import FLOAT32, WEIGHT_TYPES, WeightType
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.llvm.code_cache import DEFAULT_CACHE
from hf_sparse.runtime.model.compiled import stack_of
from hf_sparse.runtime.weights.memory import aligned
from hf_sparse.runtime.weights.rates import DENSE, MASK, NOMINAL
from hf_sparse.runtime.weights.shuffled import (
    ShuffledWeight,
    check_shuffled,
    find_window,
    pack_shuffled,
)
from hf_sparse.runtime.weights.single_rows import choose_kernel
from tests.support.closeness import same
from tests.support.compiled_folders import DECODER, logits, unsigned
from tests.support.crosses import cross
from tests.support.kernel_references import unpack_shuffled
from tests.support.single_tokens import check_nan_stays_in_its_sequence, check_rows
from tests.support.sparse_models import random_model

TYPES = list(WEIGHT_TYPES.values())
# Rows, columns: tiny, odd, no whole groups and windows, real.
SIZES = [(4, 1), (12, 7), (70, 24), (36, 129), (772, 256), (192, 576)]


def windowed(
    rows: int, columns: int, window: Window, kept: WeightType = FLOAT32, fewer: float = 0.2
) -> np.ndarray:
    """Random weights of a type that keep to a window, in float32; `fewer` windows have fewer."""
    random = np.random.default_rng(rows * columns)
    windows = -(-columns // window.columns)
    order = random.random((rows, windows, window.columns)).argsort(axis=-1)
    most = window.kept - (random.random((rows, windows, 1)) < fewer)
    weight = random.standard_normal((rows, columns)).astype(np.float32)
    weight[(order >= most).reshape(rows, -1)[:, :columns]] = 0
    return torch.from_numpy(weight).to(kept.dtype).float().numpy()


@cross("rows, columns, window, kept, name", SIZES, WINDOWS, TYPES, list(target.targets()))
def test_shuffled_rows(
    rows: int, columns: int, window: Window, kept: WeightType, name: str
) -> None:
    order = list(target.targets())
    if order.index(name) < order.index(target.host().name):
        pytest.skip(f"this CPU cannot run {name}")
    code = kernels(target.named(name), DEFAULT_CACHE, kept)
    weight = windowed(rows, columns, window, kept)
    packed = pack_shuffled(weight, window, kept)
    check_shuffled(packed, kept)
    assert np.array_equal(unpack_shuffled(packed), weight)
    x = aligned(-(-columns // 64) * 64)
    x[:columns] = torch.randn(columns)
    product = weight.astype(np.float64) @ x[:columns].double().numpy()
    groups = rows // window.rows * window.rows // 2 // window.rows * window.rows
    check_rows(code, packed, x.data_ptr(), product, [groups], 1e-5 * columns**0.5)


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.name)
def test_the_window_is_found(window: Window) -> None:
    weight = windowed(64, 96, window)
    assert find_window(weight) == window
    weight[5, : window.columns] = 1
    found = find_window(weight)
    assert found != window


def test_the_kernel_is_the_one_that_reads_and_computes_least() -> None:
    random = np.random.default_rng(0)
    for name, rates in NOMINAL.items():
        for kept in TYPES:

            def chosen(weight: np.ndarray, kept: WeightType = kept, rates=rates) -> object:
                zeros = weight.size - np.count_nonzero(weight)
                return choose_kernel(weight, zeros, kept, rates.rows)

            whole = random.standard_normal((64, 96)).astype(np.float32)
            assert chosen(whole) == DENSE
            few = np.where(random.random(whole.shape) < 0.05, 0, whole)
            assert chosen(few) == DENSE
            if name not in ("portable", "neon"):
                half = np.where(random.random(whole.shape) < 0.5, 0, whole)
                assert chosen(half) == MASK
                for window in WINDOWS[:2]:
                    assert chosen(windowed(64, 96, window, fewer=0)) == window


def changed(**fields: np.ndarray) -> ShuffledWeight:
    return replace(pack_shuffled(windowed(20, 20, WINDOWS[1]), WINDOWS[1]), **fields)


def spoiled(stream: str, place: tuple, value: float) -> np.ndarray:
    array = getattr(changed(), stream).copy()
    array[place] = value
    return array


DAMAGE: dict[str, tuple[Callable[[], ShuffledWeight], str]] = {
    "words of another type": (
        lambda: changed(words=changed().words.view(np.int32)),
        "words are int32",
    ),
    "words cut off": (lambda: changed(words=changed().words[:2]), "words have the shape"),
    "values cut off": (lambda: changed(values=changed().values[:, :2]), "values have the shape"),
    "values of another type": (
        lambda: changed(values=changed().values.astype(np.float16)),
        "values are float16",
    ),
    "too many rows": (lambda: replace(changed(), rows=40), "words have the shape"),
    "too many columns": (lambda: replace(changed(), columns=100), "words have the shape"),
    "no rows": (lambda: replace(changed(), rows=0), "0 rows"),
    "an unknown window": (lambda: replace(changed(), window=Window(8, 8)), "none of the windows"),
    "a place beyond the columns": (
        lambda: changed(words=spoiled("words", (0, -1, 0), 0b111)),
        "beyond the last column",
    ),
    "more bits": (lambda: changed(words=spoiled("words", (0, 0, 0), 1 << 24)), "more bits"),
    "a row beyond": (lambda: changed(values=spoiled("values", (-1, 0, -1, -1), 1)), "no row"),
    "not finite": (lambda: changed(values=spoiled("values", (0, 0, 0, 0), np.nan)), "infinite"),
    "strided": (
        lambda: changed(words=np.repeat(changed().words, 2, axis=1)[:, ::2]),
        "streams for single tokens",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(name: str) -> None:
    make, message = DAMAGE[name]
    with pytest.raises(ValueError, match=message):
        check_shuffled(make(), FLOAT32)


@pytest.fixture
def pruned() -> torch.nn.Module:
    sizes = {"hidden_size": 40, "intermediate_size": 52, "num_attention_heads": 5}
    model = random_model(LlamaConfig(num_hidden_layers=2, **sizes, **DECODER), 0.0)
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), "magnitude")
    return model


def test_a_compiled_model_shuffles_and_is_kept_in_files(pruned, tmp_path: Path) -> None:
    compiled = hf_sparse.compile(pruned)
    torch.testing.assert_close(logits(compiled), logits(pruned), atol=1e-4, rtol=1e-4)
    singles = [linear.single for linear in stack_of(compiled).linears]
    if target.host().has.permute:
        assert all(isinstance(single, ShuffledWeight) for single in singles)
        assert "shuffled 4 of 8" in str(compiled.explain(1))
    loaded = hf_sparse.load_compiled(hf_sparse.save_compiled(compiled, tmp_path))
    assert same(logits(loaded), logits(compiled))


def test_a_window_in_a_file_that_its_streams_do_not_fit_is_refused(pruned, tmp_path: Path) -> None:
    if not target.host().has.permute:
        pytest.skip("weights are not shuffled here")
    hf_sparse.save_compiled(hf_sparse.compile(pruned), tmp_path)
    file = tmp_path / "compiled.json"
    described = unsigned(tmp_path)
    for window, message in (
        ([8, 2], "words have the shape"),
        ([8, 3], "none"),
        ([8], "not two numbers"),
    ):
        described["blocks"][1]["linears"]["up"]["window"] = window
        file.write_text(json.dumps(described))
        with pytest.raises(FormatError, match=message):
            hf_sparse.load_compiled(tmp_path)


def test_nan_stays_in_its_sequence(pruned) -> None:
    check_nan_stays_in_its_sequence(hf_sparse.compile(pruned))
