"""Attention of one tile of queries over tiles of keys, all heads of one group.

    S[j][q] = scale * sum_d K[d][j] Q[d][q] + mask[j]       for keys j that q may see
    O[d][q] = sum_j softmax_j(S[j][q]) V[d][j]

Q, K, V and O are tiles `[feature][token]`, so that the queries are the lanes and nothing is summed
across a vector. Keys come in tiles of up to 64; softmax runs over them online (Milakov and
Gimelshein, https://arxiv.org/abs/1805.02867): a tile's maximum rescales what is there already.

Arguments: q, out (first row of the first head), heads, head_dim (a multiple of 4), k_first and
v_first (row of the first head's keys and values in a key tile), group (query heads that share
keys), keys table, key_tiles, mask, key_count, first_query, window, scale. The table has three
int64 for each key tile: address, bytes of a row, tokens. `mask` has a float for each key, of all
tiles; keys beyond `key_count` are not seen. A query at `first_query + i` sees keys j with
`j <= first_query + i` and `j > first_query + i - window`; without such limits, give large numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

from hf_sparse.runtime.kernels.activation import exponential
from hf_sparse.runtime.kernels.call import Signature
from hf_sparse.runtime.kernels.extents import Call, Extent
from hf_sparse.runtime.kernels.key_extents import tile_attention
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, Variable, vector

# Added to the score of a key that is not seen. Finite: a query that sees nothing stays a number.
UNSEEN = -1e30
# Features of a head that are summed at a time.
_FEATURES = 4


# What kernels of attention have in common: heads and their keys, and which keys queries see.
HEADS = ("ptr q", "ptr out", "i64 heads", "i64 head_dim", "i64 k_first", "i64 v_first", "i64 group")
SEEN = ("ptr table", "i64 key_tiles", "ptr mask", "i64 key_count", "i64 first_query", "i64 window")
SEEN_BY_ONE = (
    *("ptr table", "i64 width", "ptr mask", "i64 key_count", "i64 window"),
    *("ptr scores", "float scale"),
)
SIGNATURE = Signature((*HEADS, *SEEN, "float scale"), ("q", "out"))


def name(vectors: int) -> str:
    """The symbol of the kernel for query tiles of `vectors` vectors."""
    return f"attention{vectors}"


def attention(target: Target, vectors: int) -> Function:
    """The kernel for query tiles `vectors` vectors wide."""
    return _Attention(target, vectors).write()


class _Attention:
    def __init__(self, target: Target, vectors: int) -> None:
        self.f = SIGNATURE.function(name(vectors), self._extents)
        self.target, self.lanes, self.vectors = target, target.lanes, vectors
        self.size = 4 * target.lanes
        self.row_bytes = self.size * vectors
        self.kind, self.whole = vector(target.lanes), vector(target.lanes, "i32")
        # Sums that fit the registers, with room for queries and a key.
        most = max(8, target.registers // 2)
        # Keys whose scores are summed at a time: enough sums to hide a multiply-add's latency.
        self.keys = max(4, min(8, target.lanes, most // vectors))
        # Vectors of a tile's row that are summed at a time.
        self.width = vectors
        while max(self.keys, _FEATURES) * self.width > most:
            self.width //= 2
        self.scores = self.f.scratch(target.widths[0] * self.row_bytes)

    def _extents(self, call: Call) -> Iterator[Extent]:
        heads, head_dim = call["heads"], call["head_dim"]
        call.wants(head_dim % _FEATURES == 0 and call["group"] > 0, "heads of 4 features each")
        yield call.reads("q", self.row_bytes * heads * head_dim)
        yield call.writes("out", self.row_bytes * heads * head_dim)
        rows = -(-heads // call["group"]) * head_dim
        yield from tile_attention(call, rows, self.keys, self.target.widths[0])

    def write(self) -> Function:
        """The kernel."""
        f = self.f
        (q, out, heads, self.head_dim, k_first, v_first, group, *rest) = f.parameters
        (self.table, self.key_tiles, self.mask, self.key_count, first, window, scale) = rest
        self.scale = scale.splat(self.lanes)
        numbers = f.lane_numbers(self.lanes)
        start = first.cast("trunc", "i32").splat(self.lanes) + numbers
        span = window.cast("trunc", "i32").splat(self.lanes)
        self.last = [start + v * self.lanes for v in range(self.vectors)]
        self.before = [last - span for last in self.last]
        with f.range(heads) as head:
            shared = head / group * self.head_dim
            offset = head * self.head_dim * self.row_bytes
            self._head(q.at(offset), out.at(offset), k_first + shared, v_first + shared)
        return f

    def _constants(self, number: float, count: int) -> list[Variable]:
        return [self.f.variable(self.f.constant(number, self.kind)) for _ in range(count)]

    @property
    def _passes(self) -> range:
        """The first vector of each part of a row that is summed at a time."""
        return range(0, self.vectors, self.width)

    def _row(self, place: Value, first: int, align: int) -> list[Value]:
        """The vectors of a part of a row."""
        return [place.at((first + v) * self.size).load(self.kind, align) for v in range(self.width)]

    def _head(self, q: Value, out: Value, k_first: Value, v_first: Value) -> None:
        f = self.f
        largest = self._constants(2 * UNSEEN, self.vectors)
        total = self._constants(0.0, self.vectors)
        done = f.variable(f.constant(0, "i64"))
        with f.range(self.key_tiles) as tile, f.when(done.get().compare("lt", self.key_count)):
            described = self.table.at(tile * 24)
            address, stride = described.load("ptr"), described.at(8).load("i64")
            tokens = described.at(16).load("i64")
            left = self.key_count - done.get()
            # Whole groups of keys: those beyond the count are masked, their memory is there.
            wanted = f.minimum_integer(tokens, left)
            wanted = (wanted + (self.keys - 1)) / self.keys * self.keys
            k, v = address.at(k_first * stride), address.at(v_first * stride)
            fresh = [f.variable(value.get()) for value in largest]
            self._score(q, k, stride, wanted, done.get(), fresh)
            shrink = [
                exponential(f, self.target, old.get() - new.get())
                for old, new in zip(largest, fresh, strict=True)
            ]
            for number, factor in enumerate(shrink):
                total[number].set(total[number].get() * factor)
                largest[number].set(fresh[number].get())
            self._exponentials(wanted, largest, total)
            self._values(out, v, stride, wanted, shrink, done.get())
            done.set(done.get() + tokens)
        self._divide(out, total)

    def _score(
        self,
        q: Value,
        k: Value,
        stride: Value,
        wanted: Value,
        done: Value,
        largest: list[Variable],
    ) -> None:
        """Scores of one key tile, and their running maximum."""
        f = self.f
        with f.range(wanted, step=self.keys) as j:
            for first in self._passes:
                sums = [self._constants(0.0, self.width) for _ in range(self.keys)]
                column = f.variable(k.at(j * 4))
                with f.range(self.head_dim) as d:
                    queries = self._row(q.at(d * self.row_bytes), first, 4)
                    place = column.get()
                    for key in range(self.keys):
                        weight = place.at(4 * key).load("float").splat(self.lanes)
                        for query, total in zip(queries, sums[key], strict=True):
                            total.set(f.fma(weight, query, total.get()))
                    column.set(place.at(stride))
                self._mask(j, done, first, sums, largest)

    def _mask(
        self,
        j: Value,
        done: Value,
        first: int,
        sums: list[list[Variable]],
        largest: list[Variable],
    ) -> None:
        """Store the scores of some keys of a tile from key `j` on, which begins at key `done`."""
        f = self.f
        for key in range(self.keys):
            number = done + j + key
            added = self.mask.at(number * 4).load("float")
            exists = number.compare("lt", self.key_count)
            unseen = f.constant(UNSEEN, "float")
            masked = exists.select(added, unseen).splat(self.lanes)
            position = number.cast("trunc", "i32").splat(self.lanes)
            place = self.scores.at((j + key) * self.row_bytes)
            for v, total in enumerate(sums[key], first):
                score = f.fma(total.get(), self.scale, masked)
                past = position.compare("le", self.last[v])
                near = position.compare("gt", self.before[v])
                score = (past & near).select(score, f.constant(UNSEEN, self.kind))
                place.at(v * self.size).store(score, self.size)
                largest[v].set(f.maximum(score, largest[v].get()))

    def _exponentials(self, wanted: Value, largest: list[Variable], total: list[Variable]) -> None:
        """Scores become weights; a row at once, so that its vectors hide each other's latency."""
        f = self.f
        kind = vector(self.lanes * self.vectors)
        top, sums = (f.joined([value.get() for value in values]) for values in (largest, total))
        row_sum = f.variable(sums)
        with f.range(wanted) as j:
            place = self.scores.at(j * self.row_bytes)
            weight = exponential(f, self.target, place.load(kind, self.size) - top)
            place.store(weight, self.size)
            row_sum.set(row_sum.get() + weight)
        for number, value in enumerate(total):
            value.set(f.part(row_sum.get(), number * self.lanes, self.lanes))

    def _values(
        self, out: Value, v: Value, stride: Value, wanted: Value, shrink: list[Value], done: Value
    ) -> None:
        """Add one key tile's share to what is there, which counts `shrink` of what it did."""
        f = self.f
        with f.range(self.head_dim, step=_FEATURES) as d:
            rows = [v.at(d * stride)]
            for _ in range(_FEATURES - 1):
                rows.append(rows[-1].at(stride))
            for first in self._passes:
                place = out.at(d * self.row_bytes + first * self.size)
                sums = [self._constants(0.0, self.width) for _ in range(_FEATURES)]
                with f.when(done.compare("gt", 0)):
                    for feature in range(_FEATURES):
                        for number, total in enumerate(sums[feature]):
                            old = place.at(feature * self.row_bytes + number * self.size)
                            total.set(old.load(self.kind, 4) * shrink[first + number])
                with f.range(wanted) as j:
                    weights = self._row(self.scores.at(j * self.row_bytes), first, self.size)
                    for feature in range(_FEATURES):
                        value = rows[feature].at(j * 4).load("float").splat(self.lanes)
                        for weight, total in zip(weights, sums[feature], strict=True):
                            total.set(f.fma(value, weight, total.get()))
                for feature in range(_FEATURES):
                    for number, total in enumerate(sums[feature]):
                        goal = place.at(feature * self.row_bytes + number * self.size)
                        goal.store(total.get(), 4)

    def _divide(self, out: Value, total: list[Variable]) -> None:
        f = self.f
        inverse = [f.constant(1.0, self.kind) / value.get() for value in total]
        with f.range(self.head_dim) as d:
            for number, factor in enumerate(inverse):
                place = out.at(d * self.row_bytes + number * self.size)
                place.store(place.load(self.kind, 4) * factor, 4)
