"""Attention of one head whose scores are changed before the softmax: capped, biased, local.

    S[j][q] = cap(scale * sum_d K[d][j] Q[d][q]) + bias[q - j] + mask[j]    for keys j that q may see
    O[d][q] = sum_j softmax_j(S[j][q]) V[d][j]
    cap(s)  = c tanh(s / c)

As `attention.py`, whose tiles and tables these are; that kernel is for scores as they are. A tile's
scores are finished in passes of their own, behind the products: the products keep the registers.

    scored_attention   a tile of queries
    scored_row         one query, whose keys are the lanes

Arguments: q, out (the head's first rows), head_dim (a multiple of 4), k_first and v_first (row of the
head's keys and values in a key tile), keys table, key_tiles, mask, key_count, first_query, window,
ahead, scale, cap (0: none), bias. A query at `first_query + i` sees keys j with
`first_query + i - window < j <= first_query + i + ahead`. `bias` is where the float for distance 0
is, 0 without one; a query at q adds to the score of key j the float `q - j` places further, for whole
tiles of queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator

from hf_sparse.runtime.kernels.activation import exponential
from hf_sparse.runtime.kernels.attention import SEEN, SEEN_BY_ONE, UNSEEN
from hf_sparse.runtime.kernels.call import Signature
from hf_sparse.runtime.kernels.extents import Call, Extent, Extents, rounded_up
from hf_sparse.runtime.kernels.key_extents import row_attention, tile_attention
from hf_sparse.runtime.kernels.weighted_values import weighted_values
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, Variable, vector

# Features of a head that are summed at a time.
_FEATURES = 4
# Twice a score over the cap, up to which e^x is taken: beyond, the cap is reached.
_STEEPEST = 60.0

_HEAD = ("ptr q", "ptr out", "i64 head_dim", "i64 k_first", "i64 v_first")
SIGNATURE = Signature(
    (*_HEAD, *SEEN, "i64 ahead", "float scale", "float cap", "ptr bias"), ("q", "out")
)
ROW = Signature((*_HEAD, *SEEN_BY_ONE, "float cap", "ptr bias"), ("q", "out"))


def name(vectors: int) -> str:
    """The symbol of the kernel for query tiles of `vectors` vectors."""
    return f"scored_attention{vectors}"


def capped(f: Function, target: Target, score: Value, cap: Value) -> Value:
    """`c tanh(s / c) = c - 2 c / (1 + e^(2 s / c))`, within 3e-7 c."""
    steep = f.minimum(score * 2.0 / cap, f.constant(_STEEPEST, score.kind))
    return cap - cap * 2.0 / (exponential(f, target, steep) + 1.0)


def scored_attention(target: Target, vectors: int) -> Function:
    """The kernel for query tiles `vectors` vectors wide."""
    return _Scored(target, vectors).write()


class _Scored:
    def __init__(self, target: Target, vectors: int) -> None:
        self.f, self.target = SIGNATURE.function(name(vectors), self._extents), target
        self.lanes, self.vectors = target.lanes, vectors
        self.size = 4 * target.lanes
        self.row_bytes = self.size * vectors
        self.kind, self.row = vector(target.lanes), vector(target.lanes * vectors)
        # Keys whose scores are summed at a time, as far as there are registers for the sums.
        most = 4 if target.registers >= 32 else 2
        self.keys = most if vectors == 4 else 4
        self.scores = self.f.scratch(target.widths[0] * self.row_bytes)

    def _extents(self, call: Call) -> Iterator[Extent]:
        head_dim = call["head_dim"]
        call.wants(head_dim % _FEATURES == 0, "a head of 4 features")
        yield call.reads("q", self.row_bytes * head_dim)
        yield call.writes("out", self.row_bytes * head_dim)
        mask = None
        for mask in tile_attention(call, head_dim, self.keys, self.target.widths[0]):
            yield mask
        if call["bias"] and mask is not None and call["key_count"] > 0:
            # The keys of the mask: a query at q adds to the score of key j what is q - j floats away.
            last = mask.nbytes - 4
            yield call.reads("bias", last + self.row_bytes, at=4 * call["first_query"] - last)

    def write(self) -> Function:
        """The kernel."""
        f = self.f
        (self.q, self.out, self.head_dim, k_first, v_first, table, key_tiles, *rest) = f.parameters
        (self.mask, self.key_count, first, window, ahead, scale, cap, self.bias) = rest
        self.first = first
        count = self.lanes * self.vectors
        self.scale, self.cap = scale.splat(count), cap.splat(count)
        self.has_cap = cap.compare("gt", 0.0)
        self.has_bias = self.bias.cast("ptrtoint", "i64").compare("ne", 0)
        position = first.cast("trunc", "i32").splat(count) + f.lane_numbers(count)
        self.last = position + ahead.cast("trunc", "i32").splat(count)
        self.before = position - window.cast("trunc", "i32").splat(count)
        largest = f.variable(f.constant(2 * UNSEEN, self.row))
        total = f.variable(f.constant(0.0, self.row))
        done = f.variable(f.constant(0, "i64"))
        with f.range(key_tiles) as tile, f.when(done.get().compare("lt", self.key_count)):
            described = table.at(tile * 24)
            address, stride = described.load("ptr"), described.at(8).load("i64")
            tokens = described.at(16).load("i64")
            # Whole groups of keys: those beyond the count are masked, their memory is there.
            wanted = f.minimum_integer(tokens, self.key_count - done.get())
            wanted = (wanted + (self.keys - 1)) / self.keys * self.keys
            self._products(address.at(k_first * stride), stride, wanted)
            with f.when(self.has_cap), f.range(wanted) as j:
                place = self.scores.at(j * self.row_bytes)
                score = capped(f, target=self.target, score=self._load(place), cap=self.cap)
                place.store(score, self.size)
            old = largest.get()
            self._see(wanted, done.get(), largest)
            shrink = exponential(f, self.target, old - largest.get())
            total.set(total.get() * shrink)
            with f.range(wanted) as j:
                place = self.scores.at(j * self.row_bytes)
                weight = exponential(f, self.target, self._load(place) - largest.get())
                place.store(weight, self.size)
                total.set(total.get() + weight)
            self._values(address.at(v_first * stride), stride, wanted, shrink, done.get())
            done.set(done.get() + tokens)
        inverse = f.constant(1.0, self.row) / total.get()
        with f.range(self.head_dim) as d:
            place = self.out.at(d * self.row_bytes)
            place.store(place.load(self.row, 4) * inverse, 4)
        return f

    def _load(self, place: Value) -> Value:
        return place.load(self.row, self.size)

    def _sums(self) -> list[Variable]:
        return [self.f.variable(self.f.constant(0.0, self.kind)) for _ in range(self.vectors)]

    def _products(self, k: Value, stride: Value, wanted: Value) -> None:
        """Scaled products of the queries and one tile of keys."""
        f = self.f
        with f.range(wanted, step=self.keys) as j:
            sums = [self._sums() for _ in range(self.keys)]
            with f.range(self.head_dim) as d:
                row = self.q.at(d * self.row_bytes)
                queries = [row.at(v * self.size).load(self.kind, 4) for v in range(self.vectors)]
                column = k.at(d * stride + j * 4)
                for key in range(self.keys):
                    weight = column.at(4 * key).load("float").splat(self.lanes)
                    for query, total in zip(queries, sums[key], strict=True):
                        total.set(f.fma(weight, query, total.get()))
            for key in range(self.keys):
                place = self.scores.at((j + key) * self.row_bytes)
                score = f.joined([total.get() for total in sums[key]])
                place.store(score * self.scale, self.size)

    def _see(self, wanted: Value, done: Value, largest: Variable) -> None:
        """Add bias and mask to the scores of the keys that are seen, and find the largest."""
        f = self.f
        count = self.lanes * self.vectors
        unseen = f.constant(UNSEEN, "float")
        with f.range(wanted) as j:
            number = done + j
            place = self.scores.at(j * self.row_bytes)
            score = f.variable(self._load(place))
            with f.when(self.has_bias):
                bias = self.bias.at((self.first - number) * 4).load(self.row, 4)
                score.set(score.get() + bias)
            exists = number.compare("lt", self.key_count)
            masked = exists.select(self.mask.at(number * 4).load("float"), unseen).splat(count)
            position = number.cast("trunc", "i32").splat(count)
            seen = position.compare("le", self.last) & position.compare("gt", self.before)
            found = seen.select(score.get() + masked, f.constant(UNSEEN, self.row))
            place.store(found, self.size)
            largest.set(f.maximum(found, largest.get()))

    def _values(self, v: Value, stride: Value, wanted: Value, shrink: Value, done: Value) -> None:
        """Add one key tile's share to what is there, which counts `shrink` of what it did."""
        f = self.f
        parts = [f.part(shrink, v * self.lanes, self.lanes) for v in range(self.vectors)]
        step = _FEATURES if self.vectors < 4 or self.target.registers >= 32 else 2
        with f.range(self.head_dim, step=step) as d:
            place = self.out.at(d * self.row_bytes)
            sums = [self._sums() for _ in range(step)]
            with f.when(done.compare("gt", 0)):
                for feature in range(step):
                    for number, total in enumerate(sums[feature]):
                        old = place.at(feature * self.row_bytes + number * self.size)
                        total.set(old.load(self.kind, 4) * parts[number])
            rows = [v.at((d + feature) * stride) for feature in range(step)]
            with f.range(wanted) as j:
                scores = self.scores.at(j * self.row_bytes)
                weights = [
                    scores.at(number * self.size).load(self.kind, self.size)
                    for number in range(self.vectors)
                ]
                for feature in range(step):
                    value = rows[feature].at(j * 4).load("float").splat(self.lanes)
                    for weight, total in zip(weights, sums[feature], strict=True):
                        total.set(f.fma(value, weight, total.get()))
            for feature in range(step):
                for number, total in enumerate(sums[feature]):
                    place.at(feature * self.row_bytes + number * self.size).store(total.get(), 4)


def _row_extents(lanes: int) -> Extents:
    def extents(call: Call) -> Iterator[Extent]:
        yield call.reads("q", 4 * call["head_dim"])
        yield call.writes("out", 4 * call["head_dim"])
        yield from row_attention(call, call["head_dim"], lanes)
        if call["bias"] and call["key_count"] > 0:
            tiles = rounded_up(call["key_count"], call["width"])
            yield call.reads("bias", 4 * tiles, at=4 - 4 * call["key_count"])

    return extents


def scored_row(target: Target) -> Function:
    """Attention of one query over tiles of keys, with a cap, or a bias, or both.

    Arguments: q, out, head_dim, k_first, v_first, table, tokens in a key tile, mask, key_count (the
    query is the last of them), window, scores (memory for a float per key of all tiles), scale, cap
    (0: none), bias (where the float for the query's own key is, and those for keys before it before;
    there are floats for whole tiles of keys; 0: none).
    """
    f = ROW.function("scored_row", _row_extents(target.lanes))
    q, out, head_dim, k_first, v_first, table, width, mask, *rest = f.parameters
    key_count, window, scores, scale, cap, bias = rest
    lanes, kind = target.lanes, vector(target.lanes)
    key_tiles = (key_count + width - 1) / width
    count = key_count.cast("trunc", "i32").splat(lanes)
    start = (key_count - window - 1).cast("trunc", "i32").splat(lanes)
    unseen, zero = f.constant(UNSEEN, kind), f.constant(0.0, kind)
    largest = f.variable(f.constant(2 * UNSEEN, kind))
    factor, limit, numbers = scale.splat(lanes), cap.splat(lanes), f.lane_numbers(lanes)
    has_cap = cap.compare("gt", 0.0)
    has_bias = bias.cast("ptrtoint", "i64").compare("ne", 0)
    with f.range(key_tiles) as tile:
        described = table.at(tile * 24)
        stride = described.at(8).load("i64")
        rows = described.load("ptr").at(k_first * stride)
        with f.range(width, step=lanes) as j:
            total = f.variable(zero)
            with f.range(head_dim) as d:
                weight = q.at(d * 4).load("float").splat(lanes)
                keys = rows.at(d * stride + j * 4).load(kind, 4)
                total.set(f.fma(weight, keys, total.get()))
            number = tile * width + j
            position = number.cast("trunc", "i32").splat(lanes) + numbers
            exists = position.compare("lt", count) & position.compare("gt", start)
            total.set(total.get() * factor)
            with f.when(has_cap):
                total.set(capped(f, target, total.get(), limit))
            with f.when(has_bias):
                place = bias.at((number - key_count + 1) * 4)
                total.set(total.get() + place.load(kind, 4))
            score = total.get()
            score = exists.select(score + mask.at(number * 4).load(kind, 4), unseen)
            scores.at(number * 4).store(score, 4)
            largest.set(f.maximum(score, largest.get()))
    values = (v_first, head_dim)
    weighted_values(f, target, scores, largest, (table, key_tiles, width), values, out)
    return f


def functions(target: Target) -> list[Function]:
    """All kernels of this file."""
    return [*(scored_attention(target, vectors) for vectors in (1, 2, 4)), scored_row(target)]
