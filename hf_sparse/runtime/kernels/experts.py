"""Mixtures of experts: which expert computes which token, and moving tokens to their experts and back.

    route     p = softmax(logits); the `chosen` largest p of a token are its weights, the others are 0
    gather    y = the tokens of x whose weight is not 0, one behind the other
    scatter   y += weight * x, each token where `gather` found it
    weigh     x *= weight, all floats with the same one
    when      runs operations if the number of tokens is in a range

Tokens are columns: of tiles, or of a vector of features, which is a tile that is one token wide.
Programs hold the operations of every expert, for few tokens and for many; `when` runs those for which
there are tokens, so that the work is that of the tokens that are routed, and of no others.

Arguments of `route`: logits, weights `(experts, tokens)`, counts (an int64 for each expert: its
tokens), experts, tokens, bytes of a row, chosen (1 to experts), normalised (weights of a token sum up
to 1). The logits are not changed; of equal ones the first is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_sparse.runtime.kernels.activation import exponential
from hf_sparse.runtime.kernels.call import Signature, parameters
from hf_sparse.runtime.kernels.extents import Call, Extent, Extents, strided
from hf_sparse.runtime.kernels.worker import OPERATION_WORDS
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, vector

ROUTE = Signature(
    parameters(
        "ptr logits, ptr weights, ptr counts, i64 experts, i64 tokens, i64 row_bytes, "
        "i64 chosen, i64 normalised"
    )
)
MOVE = Signature(
    parameters(
        "ptr x, ptr y, ptr weights, i64 features, i64 tokens, i64 x_row_bytes, i64 y_row_bytes"
    )
)
WEIGH = Signature(("ptr x", "ptr weight", "i64 vectors"))
WHEN = Signature(("ptr count", "i64 above", "i64 most", "ptr operations", "i64 number"))


def _routing(call: Call) -> Iterator[Extent]:
    experts, size = call["experts"], strided(call["experts"], call["row_bytes"], 4 * call["tokens"])
    call.wants(0 <= call["chosen"] <= experts, "no more chosen than there are experts")
    yield call.reads("logits", size)
    yield call.writes("weights", size)
    yield call.writes("counts", 8 * experts)


def _moving(of_x: str, of_y: str, packs: bool) -> Extents:
    """Of gather, which packs tokens in y, and scatter, which has them packed in x."""

    def extents(call: Call) -> Iterator[Extent]:
        features, tokens = call["features"], call["tokens"]
        yield call.reads("weights", 4 * tokens)
        taken = int(np.count_nonzero(call.array("weights", np.float32, tokens)))
        for pointer, stride, packed in (("x", of_x, not packs), ("y", of_y, packs)):
            size = strided(features, call[stride], 4 * (taken if packed else tokens))
            yield (call.writes if pointer == "y" else call.reads)(pointer, size)

    return extents


def _running(call: Call) -> Iterator[Extent]:
    """Of `when` itself; `checking.py` looks at the operations that it runs."""
    yield call.reads("count", 8)
    yield call.reads("operations", 8 * OPERATION_WORDS * call["number"])


def route(target: Target) -> Function:
    """The kernel `route`."""
    f = ROUTE.function("route", _routing)
    logits, weights, counts, experts, tokens, row_bytes, chosen, normalised = f.parameters
    zero, none = f.constant(0.0, "float"), f.constant(0, "i64")
    with f.range(experts) as e:
        counts.at(e * 8).store(none)
    with f.range(tokens) as t:
        column, result = logits.at(t * 4), weights.at(t * 4)
        top = f.variable(column.load("float"))
        with f.range(experts) as e:
            top.set(f.maximum(column.at(e * row_bytes).load("float"), top.get()))
            result.at(e * row_bytes).store(zero)
        every, some = f.variable(zero), f.variable(zero)
        with f.range(experts) as e:
            score = column.at(e * row_bytes).load("float") - top.get()
            every.set(every.get() + _exponential(f, target, score))
        with f.range(chosen):
            best, place = f.variable(f.constant(-np.inf, "float")), f.variable(none)
            with f.range(experts) as e:
                score, taken = (one.at(e * row_bytes).load("float") for one in (column, result))
                better = score.compare("gt", best.get()) & taken.compare("eq", 0.0)
                place.set(better.select(e, place.get()))
                best.set(better.select(score, best.get()))
            row = result.at(place.get() * row_bytes)
            row.store(_exponential(f, target, best.get() - top.get()))
            some.set(some.get() + row.load("float"))
        total = normalised.compare("ne", 0).select(some.get(), every.get())
        with f.range(experts) as e:
            row, count = result.at(e * row_bytes), counts.at(e * 8)
            row.store(row.load("float") / total)
            taken = row.load("float").compare("ne", 0.0).cast("zext", "i64")
            count.store(count.load("i64") + taken)
    return f


def _exponential(f: Function, target: Target, x: Value) -> Value:
    """`e^x` of a number, by the function for vectors."""
    wide = exponential(f, target, x.splat(target.lanes))
    return f.emit("float", f"extractelement {wide}, i64 0")


def _move(name: str) -> Function:
    f = MOVE.function(name, _moving("x_row_bytes", "y_row_bytes", name == "gather"))
    x, y, weights, features, tokens, x_row_bytes, y_row_bytes = f.parameters
    there = f.variable(f.constant(0, "i64"))
    with f.range(tokens) as t:
        weight = weights.at(t * 4).load("float")
        with f.when(weight.compare("ne", 0.0)):
            near, far = t * 4, there.get() * 4
            source, goal = (x.at(near), y.at(far)) if name == "gather" else (x.at(far), y.at(near))
            with f.range(features) as i:
                value = source.at(i * x_row_bytes).load("float")
                place = goal.at(i * y_row_bytes)
                if name == "scatter":
                    value = f.fma(value, weight, place.load("float"))
                place.store(value)
            there.set(there.get() + 1)
    return f


def weigh(target: Target) -> Function:
    """The kernel `weigh`."""
    size, kind = 4 * target.lanes, vector(target.lanes)

    def extents(call: Call) -> Iterator[Extent]:
        yield call.writes("x", size * call["vectors"])
        yield call.reads("weight", 4)

    f = WEIGH.function("weigh", extents)
    x, weight, vectors = f.parameters
    factor = weight.load("float").splat(target.lanes)
    with f.range(vectors) as i:
        place = x.at(i * size)
        place.store(place.load(kind, 4) * factor, 4)
    return f


def when() -> Function:
    """Run `number` operations if `above < count <= most`; they lie as a program's do."""
    f = WHEN.function("when", _running)
    place, above, most, operations, number = f.parameters
    count = place.load("i64")
    with f.when(count.compare("gt", above) & count.compare("le", most)), f.range(number) as index:
        operation = operations.at(index * (8 * OPERATION_WORDS))
        f.do(f"call void {operation.load('ptr').name}({operation.at(8)})")
    return f


def functions(target: Target) -> list[Function]:
    """All kernels of this file."""
    return [route(target), _move("gather"), _move("scatter"), weigh(target), when()]
