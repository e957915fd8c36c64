"""Between torch's layout `(token, feature)` and tiles `[feature][token]`, and moves within tiles.

`to_tile` and `from_tile` transpose squares of `lanes` x `lanes` in registers: zipping the two
halves of the rows together log2(lanes) times transposes them. A tile that has fewer tokens than
lanes repeats its last token; those columns are computed and never read.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_sparse.runtime.kernels.call import Signature, parameters
from hf_sparse.runtime.kernels.extents import Call, Extent, Extents, strided
from hf_sparse.runtime.kernels.extents import vectors as of_vectors
from hf_sparse.runtime.kernels.key_extents import ENTRY
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, lanes_of, vector

TRANSPOSE = Signature(("ptr x", "ptr y", "i64 features", "i64 tokens", "i64 stride"))
ROTARY = Signature(("ptr x", "i64 heads", "i64 head_dim", "ptr cos", "ptr sin"))
COPY = Signature(("ptr x", "ptr y", "i64 vectors"))
APPEND = Signature(
    parameters(
        "ptr x, i64 features, i64 tokens, i64 row_bytes, ptr table, i64 first, i64 position, "
        "i64 width"
    )
)


def _transposing(target: Target, vectors: int, tokens: str, tile: str) -> Extents:
    """Between tokens at one pointer, and a tile at the other one; `y` is written."""
    width = target.lanes * vectors

    def extents(call: Call) -> Iterator[Extent]:
        call.wants(call["tokens"] > 0, "at least one token")
        count, features = min(call["tokens"], width), call["features"]
        sizes = {tile: 4 * width * features, tokens: strided(count, call["stride"], 4 * features)}
        yield call.reads("x", sizes["x"])
        yield call.writes("y", sizes["y"])

    return extents


def rotary_extents(row_bytes: int) -> Extents:
    """What a rotation reads and writes, whose features have `row_bytes` bytes each."""

    def extents(call: Call) -> Iterator[Extent]:
        pairs = call["head_dim"] // 2 * 2
        yield call.writes("x", row_bytes * strided(call["heads"], call["head_dim"], pairs))
        for name in ("cos", "sin"):
            yield call.reads(name, row_bytes * pairs if call["heads"] > 0 else 0)

    return extents


def _appending(call: Call) -> Iterator[Extent]:
    features, tokens, position, width = (
        call[name] for name in ("features", "tokens", "position", "width")
    )
    call.wants(position >= 0 and width > 0, "a position and a width of key tiles")
    yield call.reads("x", strided(features, call["row_bytes"], 4 * tokens))
    for number in range(position // width, -(-(position + tokens) // width) if tokens > 0 else 0):
        yield call.reads("table", 16, at=ENTRY * number)
        address, stride = call.array("table", np.int64, 2, at=ENTRY * number).tolist()
        begin = max(position - number * width, 0)
        end = min(position + tokens - number * width, width)
        place = address + call["first"] * stride + 4 * begin
        yield Extent("keys", place, strided(features, stride, 4 * (end - begin)), True)


def to_tile(target: Target, vectors: int) -> Function:
    """`y[f][t] = x[t][f]`. Arguments: x, y, features, tokens, bytes between tokens of x."""
    f = TRANSPOSE.function(f"to_tile{vectors}", _transposing(target, vectors, "x", "y"))
    x, y, features, tokens, stride = f.parameters
    lanes, size = target.lanes, 4 * target.lanes
    squares = features / lanes * lanes
    last = tokens - 1
    for v in range(vectors):
        starts = []
        for lane in range(lanes):
            token = f.minimum_integer(f.constant(v * lanes + lane, "i64"), last)
            starts.append(x.at(token * stride))
        with f.range(squares, step=lanes) as i:
            rows = _transposed(f, [start.at(i * 4).load(vector(lanes), 4) for start in starts])
            for number, row in enumerate(rows):
                place = (i + number) * (size * vectors)
                y.at(place).at(v * size).store(row, size)
        with f.range(features, start=squares) as i:
            for lane, start in enumerate(starts):
                place = i * (size * vectors)
                y.at(place).at(v * size + 4 * lane).store(start.at(i * 4).load("float"))
    return f


def from_tile(target: Target, vectors: int) -> Function:
    """`y[t][f] = x[f][t]`. Arguments: x, y, features, tokens, bytes between tokens of y."""
    f = TRANSPOSE.function(f"from_tile{vectors}", _transposing(target, vectors, "y", "x"))
    x, y, features, tokens, stride = f.parameters
    lanes, size = target.lanes, 4 * target.lanes
    squares = features / lanes * lanes
    for v in range(vectors):
        exist = [tokens.compare("gt", f.constant(v * lanes + lane, "i64")) for lane in range(lanes)]
        with f.range(squares, step=lanes) as i:
            loaded = [
                x.at((i + number) * (size * vectors)).at(v * size).load(vector(lanes), size)
                for number in range(lanes)
            ]
            for lane, row in enumerate(_transposed(f, loaded)):
                with f.when(exist[lane]):
                    token = stride * (v * lanes + lane)
                    y.at(token + i * 4).store(row, 4)
        with f.range(features, start=squares) as i:
            row = x.at(i * (size * vectors)).at(v * size)
            for lane in range(lanes):
                with f.when(exist[lane]):
                    y.at(stride * (v * lanes + lane) + i * 4).store(row.at(4 * lane).load("float"))
    return f


def _transposed(f: Function, rows: list[Value]) -> list[Value]:
    half = len(rows) // 2
    stage = len(rows)
    while stage > 1:
        pairs = [_zipped(f, rows[i], rows[i + half]) for i in range(half)]
        rows = [row for pair in pairs for row in pair]
        stage //= 2
    return rows


def _zipped(f: Function, a: Value, b: Value) -> tuple[Value, Value]:
    lanes = lanes_of(a.kind)
    halves = []
    for start in (0, lanes // 2):
        order = [number for i in range(start, start + lanes // 2) for number in (i, lanes + i)]
        halves.append(f.shuffle(a, b, order))
    return halves[0], halves[1]


def rotary(target: Target, vectors: int) -> Function:
    """Rotate pairs of features, a head's d and d + half, in place: rotary position embedding.

        x[d]        = x[d] cos[d] - x[d + half] sin[d]
        x[d + half] = x[d + half] cos[d + half] + x[d] sin[d + half]

    Arguments: x, heads, head_dim, cos, sin; the latter tiles of `head_dim` rows.
    Source: Su et al., RoFormer, https://arxiv.org/abs/2104.09864, in the half-split order of Llama.
    """
    f = ROTARY.function(f"rotary{vectors}", rotary_extents(4 * target.lanes * vectors))
    x, heads, head_dim, cos, sin = f.parameters
    size, kind = 4 * target.lanes, vector(target.lanes)
    row_bytes = size * vectors
    half = head_dim / 2
    with f.range(heads) as head, f.range(half) as d:
        row = (head * head_dim + d) * row_bytes
        low, high = x.at(row), x.at(row).at(half * row_bytes)
        place = d * row_bytes
        for v in range(vectors):
            first, second = low.at(v * size).load(kind, 4), high.at(v * size).load(kind, 4)
            factors = [
                table.at(place + offset).at(v * size).load(kind, 4)
                for table in (cos, sin)
                for offset in (f.constant(0, "i64"), half * row_bytes)
            ]
            cos_low, cos_high, sin_low, sin_high = factors
            low.at(v * size).store(first * cos_low - second * sin_low, 4)
            high.at(v * size).store(f.fma(second, cos_high, first * sin_high), 4)
    return f


def copy(target: Target) -> Function:
    """`y = x`. Arguments: x, y, vectors."""
    size = 4 * target.lanes
    f = COPY.function("copy", of_vectors(size, "y", reads=("x",)))
    x, y, vectors = f.parameters
    with f.range(vectors) as i:
        y.at(i * size).store(x.at(i * size).load(vector(target.lanes), 4), 4)
    return f


def append() -> Function:
    """Copy tokens of a tile's rows into tiles of keys, at any position.

    Arguments: x, features, tokens, bytes of a row of x, table of the key tiles (see `attention.py`),
    first row in them, position of the first token, tokens in a key tile.
    """
    f = APPEND.function("append", _appending)
    x, features, tokens, row_bytes, table, first, position, width = f.parameters
    with f.range(tokens) as t:
        at = position + t
        tile = at / width
        described = table.at(tile * 24)
        address, stride = described.load("ptr"), described.at(8).load("i64")
        place = address.at(first * stride + (at - tile * width) * 4)
        with f.range(features) as i:
            place.at(i * stride).store(x.at(i * row_bytes + t * 4).load("float"))
    return f
