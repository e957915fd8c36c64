"""Writing LLVM IR: one function at a time, as text, with Python's operators and `with` blocks.

    function = Function("scale", ("ptr x", "i64 count", "float factor"))
    x, count, factor = function.parameters
    with function.range(count) as i:
        place = x.at(i * 4)
        place.store(place.load("float") * factor)

`values.py` has what `x`, `i` and `place` are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hf_sparse.runtime.llvm.values import Body, Value, element_of, lanes_of, vector


class Function(Body):
    """One kernel. Its arguments come in an array of 8-byte words, so that all kernels are called alike.

    Args:
        name: of the symbol.
        parameters: types and names, as `"ptr x"`, `"i64 count"`, `"float scale"`. Pointers do not
            overlap, unless listed in `shared`.
        extents: what a call reads and writes (`kernels/extents.py`).
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[str],
        shared: Sequence[str] = (),
        extents: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.signature, self.extents = name, tuple(parameters), extents
        self._kinds = [parameter.split()[0] for parameter in parameters]
        names = [parameter.split()[1] for parameter in parameters]
        self._attributes = [
            " noalias" if kind == "ptr" and name not in shared else ""
            for kind, name in zip(self._kinds, names, strict=True)
        ]
        self.parameters = [
            Value(self, kind, f"%{name}") for kind, name in zip(self._kinds, names, strict=True)
        ]

    def _intrinsic(self, name: str, *operands: Value) -> Value:
        kind = operands[0].kind
        lanes, element = lanes_of(kind), element_of(kind)
        short = {"float": "f32"}.get(element, element)
        return self.call(kind, f"llvm.{name}.{f'v{lanes}' if lanes else ''}{short}", *operands)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """`a * b + c`, fused where the CPU can."""
        return self._intrinsic("fmuladd", a, b, c)

    def in_registers(
        self, name: str, lanes: int, operands: tuple[Value, ...], rounding: int | None = None
    ) -> Value:
        """A masked AVX-512 intrinsic on every register of wide vectors, with all lanes active.

        Args:
            name: of the intrinsic, whose arguments end in (zeros, mask) or (zeros, mask, rounding).
            lanes: of a register.
            operands: vectors of the same type, of a whole number of registers.
            rounding: the instruction's mode, for those that have one.
        """
        whole, kind = lanes_of(operands[0].kind), vector(lanes)
        ends = [self.constant(0.0, kind), self.constant(-1, f"i{lanes}")]
        ends += [] if rounding is None else [self.constant(rounding, "i32")]
        parts = []
        for start in range(0, whole, lanes):
            chosen = [self.part(operand, start, lanes) for operand in operands]
            parts.append(self.call(kind, name, *chosen, *ends))
        return self.joined(parts)

    def joined(self, parts: Sequence[Value]) -> Value:
        """Vectors of the same type behind one another; their number is a power of two."""
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [self.shuffle(a, b, range(2 * lanes_of(a.kind))) for a, b in pairs]
        return parts[0]

    def part(self, a: Value, start: int, lanes: int) -> Value:
        """`lanes` lanes of a vector from `start` on."""
        if lanes == lanes_of(a.kind):
            return a
        return self.shuffle(a, Value(self, a.kind, "poison"), range(start, start + lanes))

    def shuffle(self, a: Value, b: Value, chosen: Iterable[int]) -> Value:
        """The lanes `chosen` of `a` and `b`, counted through both."""
        text = ", ".join(f"i32 {lane}" for lane in chosen)
        lanes = text.count("i32")
        kind = vector(lanes, element_of(a.kind))
        return self.emit(kind, f"shufflevector {a}, {b}, {vector(lanes, 'i32')} <{text}>")

    def maximum(self, a: Value, b: Value) -> Value:
        """The larger one; neither may be NaN."""
        return a.compare("gt", b).select(a, b)

    def minimum(self, a: Value, b: Value) -> Value:
        """The smaller one; neither may be NaN."""
        return a.compare("lt", b).select(a, b)

    def minimum_integer(self, a: Value, b: Value) -> Value:
        """The smaller of two signed integers."""
        return a.compare("lt", b).select(a, b)

    def sqrt(self, a: Value) -> Value:
        """The square root."""
        return self._intrinsic("sqrt", a)

    def round(self, a: Value) -> Value:
        """The nearest whole number, as a float."""
        return self._intrinsic("nearbyint", a)

    def popcount(self, a: Value) -> Value:
        """The number of set bits."""
        return self._intrinsic("ctpop", a)

    def total(self, a: Value) -> Value:
        """The sum of a vector's lanes."""
        lanes = lanes_of(a.kind)
        name = f"llvm.vector.reduce.fadd.v{lanes}f32"
        self.declare(f"declare float @{name}(float, {a.kind})")
        return self.emit("float", f"call reassoc float @{name}(float 0.0, {a})")

    def largest(self, a: Value) -> Value:
        """The largest of a vector's lanes."""
        return self.call("float", f"llvm.vector.reduce.fmax.v{lanes_of(a.kind)}f32", a)

    def lane_numbers(self, lanes: int) -> Value:
        """`0, 1, 2, ...` as i32."""
        text = ", ".join(f"i32 {lane}" for lane in range(lanes))
        return Value(self, vector(lanes, "i32"), f"<{text}>")

    def label(self, name: str) -> None:
        """Start a block; the one before must have jumped."""
        self._lines.append(f"{name}:")

    @contextmanager
    def range(self, stop: Value, start: Value | int = 0, step: int = 1) -> Iterator[Value]:
        """Repeat for `start <= i < stop`."""
        first = self.constant(start, stop.kind) if isinstance(start, int) else start
        index = self.variable(first)
        with self.loop_while(lambda: index.get().compare("lt", stop)):
            yield index.get()
            index.set(index.get() + step)

    @contextmanager
    def loop_while(self, condition: Callable[[], Value]) -> Iterator[None]:
        """Repeat while `condition()`, written anew in each round, holds."""
        head, body, done = (self._fresh() for _ in range(3))
        self.do(f"br label %{head}")
        self.label(head)
        self.do(f"br {condition()}, label %{body}, label %{done}")
        self.label(body)
        yield
        self.do(f"br label %{head}")
        self.label(done)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Only if `condition` holds."""
        body, done = self._fresh(), self._fresh()
        self.do(f"br {condition}, label %{body}, label %{done}")
        self.label(body)
        yield
        self.do(f"br label %{done}")
        self.label(done)

    def cases(self, value: Value, count: int) -> Iterator[int]:
        """Write one body for each value in `0 .. count - 1`; other values are undefined."""
        bodies, done = [self._fresh() for _ in range(count)], self._fresh()
        table = " ".join(f"{value.kind} {case}, label %{body}" for case, body in enumerate(bodies))
        nowhere = self._fresh()
        self.do(f"switch {value}, label %{nowhere} [ {table} ]")
        self.label(nowhere)
        self.do("unreachable")
        for case, body in enumerate(bodies):
            self.label(body)
            yield case
            self.do(f"br label %{done}")
        self.label(done)

    def text(self) -> str:
        """The function, and the entry that reads its arguments from an array: `void name(ptr)`."""
        inner = ", ".join(
            f"{value.kind}{attribute} {value.name}"
            for value, attribute in zip(self.parameters, self._attributes, strict=True)
        )
        lines = [
            f"define internal void @{self.name}.body({inner}) alwaysinline nounwind {{",
            *self.allocations,
            *self._lines,
            "  ret void",
            "}",
            f"define void @{self.name}(ptr noalias %arguments) nounwind {{",
        ]
        for index, kind in enumerate(self._kinds):
            lines += [
                f"  %p{index} = getelementptr i64, ptr %arguments, i64 {index}",
                f"  %a{index} = load {kind}, ptr %p{index}, align 8",
            ]
        passed = ", ".join(f"{kind} %a{index}" for index, kind in enumerate(self._kinds))
        lines += [f"  call void @{self.name}.body({passed})", "  ret void", "}"]
        return "\n".join(lines)
