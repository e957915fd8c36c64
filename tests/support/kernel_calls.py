"""Calls of every kernel over sizes that are small, odd, whole, and of one token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from hf_sparse.runtime.kernels import (
    activation,
    addition,
    attention,
    byte_tiles,
    code_rows,
    experts,
    normalisation,
    peaks,
    scored_attention,
    single_token,
    spmm,
    tiles,
    unpack_bytes,
)
from hf_sparse.runtime.kernels.call import Operation, Signature
from hf_sparse.runtime.kernels.code_formats import FORMATS
from hf_sparse.runtime.kernels.shuffled_rows import WINDOWS
from hf_sparse.runtime.kernels.weight_types import WeightType
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.weights import panels
from hf_sparse.runtime.weights.code_part import CodePart
from hf_sparse.runtime.weights.codes import pack_codes
from hf_sparse.runtime.weights.dense_weight import DenseWeight
from hf_sparse.runtime.weights.linear import TileWeight
from hf_sparse.runtime.weights.memory import aligned
from hf_sparse.runtime.weights.rows import RowWeight, pack_decode
from hf_sparse.runtime.weights.shuffled import pack_shuffled
from tests.support.coded_weights import random_codes, random_scales

# Rows and columns of weights.
SIZES = [(4, 1), (12, 7), (36, 129), (132, 256)]


@dataclass(frozen=True)
class Example:
    """An operation, with what keeps its memory.

    Attributes:
        tiles: key tiles, whose addresses its table has.
    """

    operation: Operation
    memory: list[object]
    tiles: list[np.ndarray] = field(default_factory=list)


@cache
def _floats(count: int, name: str = "") -> np.ndarray:
    """Random numbers, the same memory for each name: kernels only ever see copies."""
    random = np.random.default_rng(count)
    found = aligned(count).numpy()
    found[:] = random.uniform(-1, 1, count)
    return found


def _example(
    signature: Signature,
    kernel: str,
    arrays: dict[str, np.ndarray],
    stored: list[np.ndarray] | None = None,
    /,
    **numbers: Any,
) -> Example:
    places = {name: array.ctypes.data for name, array in arrays.items()}
    operation = signature.operation(kernel, **places, **numbers)
    return Example(operation, list(arrays.values()), stored or [])


def _room(*names: str) -> dict[str, np.ndarray]:
    return {name: _floats(1 << 14, name) for name in names}


def plain_calls(target: Target) -> Iterator[Example]:
    """Of kernels that are the same for all weights, but attention."""
    for vectors in (0, 1, 3, 4, 9):
        yield _example(tiles.COPY, "copy", _room("x", "y"), vectors=vectors)
        yield _example(addition.SIGNATURE, "add", _room("x", "y"), vectors=vectors)
        yield _example(experts.WEIGH, "weigh", _room("x", "weight"), vectors=vectors)
        for name in activation.ACTIVATIONS:
            for kernel in (name, f"{name}_gate"):
                yield _example(activation.SIGNATURE, kernel, _room("x", "y"), vectors=vectors)
    yield _example(peaks.MULTIPLY_ADDS, "multiply_adds", _room("x"), rounds=2)
    yield _example(peaks.READS, "reads", _room("x", "y"), nbytes=8 * peaks.SUMS * target.lanes)
    for features in (1, 7, 16, 33):
        numbers = {"features": features, "groups": 3, "epsilon": 1e-5}
        for norm in normalisation.NORMS:
            for kernel in (f"{norm}_norm_row", *(f"{norm}_norm{v}" for v in (1, 2, 4))):
                pointers = _room("x", "y", "weight", "bias")
                yield _example(normalisation.SIGNATURE, kernel, pointers, **numbers)
        for kernel in ("rotary_row", "rotary1", "rotary2", "rotary4"):
            numbers = {"heads": 3, "head_dim": features + features % 2}
            yield _example(tiles.ROTARY, kernel, _room("x", "cos", "sin"), **numbers)
        for vectors in (1, 2, 4):
            for tokens in (1, 3, vectors * target.lanes):
                numbers = {"features": features, "tokens": tokens, "stride": 4 * features + 12}
                for kernel in (f"to_tile{vectors}", f"from_tile{vectors}"):
                    yield _example(tiles.TRANSPOSE, kernel, _room("x", "y"), **numbers)
    yield from _mixtures()


def _mixtures() -> Iterator[Example]:
    for count, tokens in ((1, 1), (5, 3), (8, 16)):
        numbers = {"experts": count, "tokens": tokens, "row_bytes": 4 * tokens + 8}
        pointers = _room("logits", "weights", "counts")
        chosen = {"chosen": (count + 1) // 2, "normalised": count % 2}
        yield _example(experts.ROUTE, "route", pointers, **numbers, **chosen)
        for kernel in ("gather", "scatter"):
            pointers = _room("x", "y", "weights")
            pointers["weights"] = pointers["weights"].copy()
            pointers["weights"][:tokens:2] = 0
            numbers = {"features": count, "tokens": tokens}
            strides = {"x_row_bytes": 4 * tokens, "y_row_bytes": 4 * tokens + 4}
            yield _example(experts.MOVE, kernel, pointers, **numbers, **strides)
    pointers = {"count": np.array([2]), "operations": np.zeros(16, np.int64)}
    numbers = {"above": 2, "most": 5, "number": 1}
    yield _example(experts.WHEN, "when", pointers, **numbers)


def attention_calls(target: Target) -> Iterator[Example]:
    """Of one query and of tiles of them, over few keys and several tiles of keys."""
    widest = target.widths[0]
    for head_dim, keys in ((4, 1), (8, 5), (12, widest), (4, 2 * widest + 7)):
        for vectors in (0, 1, 2, 4):  # 0 is the kernel for one query
            width = widest if vectors != 1 else target.lanes
            count = -(-keys // width)
            rows, heads, group = 6 * head_dim, 4, 2
            key_tiles = [
                _floats(rows * width, str(tile)).reshape(rows, width) for tile in range(count)
            ]
            table = np.zeros((count, 3), np.int64)
            table[:, 0] = [tile.ctypes.data for tile in key_tiles]
            table[:, 1], table[:, 2] = 4 * width, width
            given = _room("q", "out", "mask", *([] if vectors else ["scores"])) | {"table": table}
            numbers: dict[str, int | float] = {"head_dim": head_dim, "key_count": keys}
            numbers |= {"k_first": head_dim, "v_first": 3 * head_dim, "window": 3, "scale": 0.5}
            seen = {"first_query": keys - 1, "key_tiles": count} if vectors else {"width": width}
            several = {"heads": heads, "group": group}
            biases = _floats(1 << 14, "biases")
            if vectors == 0:
                signature, row = single_token.ATTENTION, {**numbers, **seen}
                yield _example(signature, "attention_row", given, key_tiles, **row, **several)
                signature = scored_attention.ROW
                for cap, bias in ((3.0, 0), (0.0, biases[1 << 13 :].ctypes.data)):
                    yield _example(
                        signature, "scored_row", given, key_tiles, **row, cap=cap, bias=bias
                    )
                yield from _appends(head_dim, keys, width, key_tiles, table)
                continue
            tile = {**numbers, **seen}
            kernel = attention.name(vectors)
            yield _example(attention.SIGNATURE, kernel, given, key_tiles, **tile, **several)
            signature, kernel = scored_attention.SIGNATURE, scored_attention.name(vectors)
            scored: dict[str, int | float] = {"ahead": 1, "cap": 2.0}
            for bias in (0, biases[1 << 13 :].ctypes.data):
                example = _example(signature, kernel, given, key_tiles, **tile, **scored, bias=bias)
                example.memory.append(biases)
                yield example


def _appends(
    head_dim: int, keys: int, width: int, key_tiles: list[np.ndarray], table: np.ndarray
) -> Iterator[Example]:
    for position, tokens in ((keys - 1, 1), (0, keys)):
        numbers = {"features": head_dim, "tokens": tokens, "row_bytes": 4 * tokens}
        place = {"first": head_dim, "position": position, "width": width}
        given = _room("x") | {"table": table}
        yield _example(tiles.APPEND, "append", given, key_tiles, **numbers, **place)


def _weight(rows: int, columns: int, kept: WeightType) -> np.ndarray:
    random = np.random.default_rng(rows)
    weight = random.standard_normal((rows, columns)) * (random.random((rows, columns)) < 0.5)
    return torch.from_numpy(weight).to(kept.dtype).float().numpy()


def _rows(width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _floats(256 * width, "x"), _floats(256 * width, "y"), _floats(256, "bias")


def weight_calls(target: Target, kept: WeightType) -> Iterator[Example]:
    """Of products with packed and plain weights of a type, tiles and single tokens."""
    for rows, columns in SIZES:
        weight = _weight(rows, columns, kept)
        whole = torch.from_numpy(weight).to(kept.dtype)
        for vectors in (1, 2, 4):
            x, y, bias = _rows(vectors * target.lanes)
            places = (x.ctypes.data, y.ctypes.data, bias.ctypes.data)
            own: list[TileWeight] = [DenseWeight(whole, 0, columns)]
            own += [panels.pack(weight, height, kept) for height in spmm.UNROLL]
            for packed in own:
                for start in (spmm.START_SUM, spmm.START_SUM_BIAS):
                    operation = packed.operation(0, vectors, *places, start)
                    yield Example(operation, [packed, weight, x, y, bias])
        x, y, bias = _rows(1)
        single: list[RowWeight] = [pack_decode(weight, kept)]
        for window in WINDOWS:
            fits = np.arange(columns) % window.columns < window.kept
            single.append(pack_shuffled(weight * fits, window, kept))
        for rows_weight in single:
            operation = rows_weight.operation(x.ctypes.data, y.ctypes.data, 0, 0, rows, add=True)
            yield Example(operation, [rows_weight, x, y])
        wide = _weight(rows, -(-columns // 16) * 16, kept)
        stored = torch.from_numpy(wide).to(kept.dtype)
        operation = single_token.DENSE_ROWS.operation(
            f"dense_rows{kept.suffix}",
            weight=stored.data_ptr(),
            row_bytes=kept.size * wide.shape[1],
            x=x.ctypes.data,
            y=y.ctypes.data,
            bias=bias.ctypes.data,
            groups=rows // 4,
            columns=wide.shape[1],
            add=0,
        )
        yield Example(operation, [stored, x, y, bias])


def code_calls(target: Target) -> Iterator[Example]:
    """Of products with codes of every format, of records, and of unpacked blocks."""
    for blocks in (1, 3):
        given = _room("x", "records")
        yield _example(code_rows.QUANTISE_ROW, "quantise_row", given, blocks=blocks)
    for vectors in (1, 2, 4):
        for columns in (1, 64, 70):
            given = _room("x", "records")
            kernel = f"quantise_tile{vectors}"
            yield _example(byte_tiles.QUANTISE_TILE, kernel, given, columns=columns)
    for form in FORMATS:
        for rows, columns in ((4, 1), (13, 70), (36, 129)):
            codes = random_codes(rows, columns, form)
            scales = random_scales(rows, -(-columns // form.group))
            packed = pack_codes(codes, scales, form.group, form)
            x, y, bias = _room("x", "y", "bias").values()
            places = (x.ctypes.data, y.ctypes.data, bias.ctypes.data)
            yield Example(packed.operation(*places, 0, rows, add=False), [packed, x, y, bias])
            yield from _first_block(packed.at(0), form.suffix, packed)
            part = CodePart(packed, 0, columns)
            for vectors in (1, 2, 4):
                x, y, bias = _rows(vectors * target.lanes)
                places = (x.ctypes.data, y.ctypes.data, bias.ctypes.data)
                operation = part.operation(0, vectors, *places, spmm.START_BIAS)
                yield Example(operation, [part, x, y, bias])


def _first_block(at: dict[str, int], suffix: str, packed: object) -> Iterator[Example]:
    room = _floats(256, "room")
    operation = unpack_bytes.UNPACK_BYTES.operation(
        f"unpack_bytes{suffix}", codes=at["codes"], places=at["places"], room=room.ctypes.data
    )
    yield Example(operation, [packed, room])
