"""Activations, in place on rows of a tile (or on any aligned floats).

All are `x * sigmoid(t(x))`, with t a polynomial, and differ in t alone:

    silu       t = x
    gelu_tanh  t = 2 sqrt(2/pi) (x + 0.044715 x^3)
    gelu       t = x q(x^2), fitted so that sigmoid(t) is the normal distribution function

The fit (`benchmarks/fit_polynomials.py` prints it) is within 6e-7 of the exact GELU, which is the
order of float32's own rounding there. `relu` is the exception.

Arguments: x, y, vectors (faster by whole `UNROLL`), both aligned to a vector. `x = act(x)`; `gate`
kernels: `x = act(x) * y`.
"""

from __future__ import annotations

import math

import numpy as np

from hf_sparse.runtime.kernels.call import Signature
from hf_sparse.runtime.kernels.extents import vectors as of_vectors
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, element_of, lanes_of, vector

# Vectors in a round; the kernels write whole rounds.
UNROLL = 4

# q(s) of gelu for s = x^2 up to _LARGEST^2, lowest power first.
_LARGEST = 5.5
GELU_FIT = (
    1.5957684516906738,
    0.07266856729984283,
    -6.62599632050842e-05,
    -0.0001104803232010454,
    7.93821982369991e-06,
    -2.6689286869441275e-07,
    3.6112339785177028e-09,
)
# e^r for |r| <= ln 2 / 2, lowest power first.
EXPONENTIAL_FIT = (
    1.0000001192092896,
    0.9999997019767761,
    0.49998894333839417,
    0.16667574644088745,
    0.04191543161869049,
    0.008297648280858994,
)
# The rounding mode of an instruction that is told one.
_NEAREST = 4
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu")
SIGNATURE = Signature(("ptr x", "ptr y", "i64 vectors"))


def exponential(f: Function, target: Target, x: Value) -> Value:
    """`e^x` for float vectors up to 88, relative error 2e-7; below -87 it is `e^-87`.

    With n = round(x / ln 2): e^x = 2^n e^r, |r| <= ln 2 / 2, and a polynomial of degree 5 for e^r
    with the least relative error, 8e-8.
    """
    kind = x.kind
    lanes = lanes_of(kind)
    x = f.maximum(x, f.constant(-87.0, kind))
    n = f.round(x * (1 / math.log(2)))
    # ln 2 in two parts, of which the first has few bits, so that n times it is exact.
    rest = f.fma(n, f.constant(-0.693145751953125, kind), x)
    rest = f.fma(n, f.constant(-1.42860677e-6, kind), rest)
    total = f.constant(EXPONENTIAL_FIT[-1], kind)
    for coefficient in EXPONENTIAL_FIT[-2::-1]:
        total = f.fma(total, rest, f.constant(coefficient, kind))
    if target.has.scale:
        return f.in_registers(target.has.scale, target.lanes, (total, n), _NEAREST)
    exponent = (n.cast("fptosi", vector(lanes, "i32")) + 127) << 23
    return total * exponent.cast("bitcast", kind)


def reciprocal(f: Function, target: Target, x: Value) -> Value:
    """`1 / x` for float vectors whose size is between 1e-37 and 1e37, relative error 2e-7."""
    kind = x.kind
    if not target.has.reciprocal:
        return f.constant(1.0, kind) / x
    # 14 bits from the CPU's table, and one step of Newton's method.
    guess = f.in_registers(target.has.reciprocal, target.lanes, (x,))
    return guess * (f.constant(2.0, kind) - x * guess)


def sigmoid_argument(f: Function, name: str, x: Value) -> Value:
    """The polynomial t(x) of an activation."""
    if name == "silu":
        return x
    square = x * x
    if name == "gelu_tanh":
        slope = 2 * math.sqrt(2 / math.pi)
        constant = f.constant(slope, x.kind)
        return x * f.fma(square, f.constant(slope * 0.044715, x.kind), constant)
    square = f.minimum(square, f.constant(_LARGEST**2, x.kind))
    total = f.constant(GELU_FIT[-1], x.kind)
    for coefficient in GELU_FIT[-2::-1]:
        total = f.fma(total, square, f.constant(coefficient, x.kind))
    return x * total


def activate(f: Function, target: Target, name: str, x: Value) -> Value:
    """`act(x)` of a float vector."""
    assert element_of(x.kind) == "float"
    zero = f.constant(0.0, x.kind)
    if name == "relu":
        return f.maximum(x, zero)
    # Below this a sigmoid is 0 to float32, and e^-t would be infinite.
    argument = f.maximum(sigmoid_argument(f, name, x), f.constant(-86.0, x.kind))
    return x * reciprocal(f, target, exponential(f, target, zero - argument) + 1.0)


def activation(target: Target, name: str, *, gated: bool) -> Function:
    """The kernel `name` or `name_gate`."""
    extents = of_vectors(4 * target.lanes, "x", reads=("y",) if gated else ())
    function = SIGNATURE.function(f"{name}_gate" if gated else name, extents)
    x, y, vectors = function.parameters
    # One value of several registers: their instructions take turns, and hide each other's latency.
    size, whole = 4 * target.lanes, vectors / UNROLL * UNROLL
    for first, stop, count in ((0, whole, UNROLL), (whole, vectors, 1)):
        kind = vector(count * target.lanes)
        with function.range(stop, start=first, step=count) as i:
            place = x.at(i * size)
            result = activate(function, target, name, place.load(kind, size))
            if gated:
                result = result * y.at(i * size).load(kind, size)
            place.store(result, size)
    return function


def activation_ref(name: str, x: np.ndarray) -> np.ndarray:
    """The same in float64, from the definitions."""
    x = x.astype(np.float64)
    if name == "relu":
        return np.asarray(np.maximum(x, 0))
    if name == "silu":
        return np.asarray(x / (1 + np.exp(-x)))
    if name == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return np.asarray(0.5 * x * (1 + np.tanh(inner)))
    erf = np.vectorize(math.erf)
    return np.asarray(0.5 * x * (1 + erf(x / math.sqrt(2))))
