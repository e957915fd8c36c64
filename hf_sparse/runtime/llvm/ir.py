"""Writing LLVM IR: one function at a time, as text, with Python's operators and `with` blocks.

    function = Function("scale", ("ptr x", "i64 count", "float factor"))
    x, count, factor = function.parameters
    with function.range(count) as i:
        place = x.at(i * 4)
        place.store(place.load("float") * factor)

Values are immutable; `Variable` is a place on the stack that LLVM turns into registers. Vectors
have their type written out, `<16 x float>`: nothing here is left to the auto-vectoriser.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

Number = int | float

_FLOAT = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
_INTEGER = {"add": "add", "sub": "sub", "mul": "mul", "div": "udiv"}


def vector(lanes: int, element: str = "float") -> str:
    """The type of a vector."""
    return f"<{lanes} x {element}>"


def lanes_of(kind: str) -> int:
    """The lanes of a vector type, 0 for a scalar."""
    return int(kind[1:].split(" x ")[0]) if kind.startswith("<") else 0


def element_of(kind: str) -> str:
    """The element of a vector type; a scalar type itself."""
    return kind[1:-1].split(" x ")[1] if kind.startswith("<") else kind


def literal(number: Number, kind: str) -> str:
    """A constant of a scalar or vector type."""
    element = element_of(kind)
    if element == "float":
        rounded = struct.unpack("f", struct.pack("f", number))[0]
        text = f"0x{struct.unpack('Q', struct.pack('d', rounded))[0]:016X}"
    else:
        text = str(int(number))
    lanes = lanes_of(kind)
    return f"<{', '.join([f'{element} {text}'] * lanes)}>" if lanes else text


@dataclass(frozen=True)
class Value:
    """A number, a vector or a pointer inside a function."""

    function: Function
    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    def _is_float(self) -> bool:
        return element_of(self.kind) == "float"

    def _operand(self, other: Value | Number) -> str:
        if isinstance(other, Value):
            if other.kind != self.kind:
                raise TypeError(f"{self.kind} with {other.kind}")
            return other.name
        return literal(other, self.kind)

    def _binary(self, name: str, other: Value | Number) -> Value:
        code = (_FLOAT if self._is_float() else _INTEGER).get(name, name)
        return self.function.emit(self.kind, f"{code} {self}, {self._operand(other)}")

    def __add__(self, other: Value | Number) -> Value:
        return self._binary("add", other)

    def __sub__(self, other: Value | Number) -> Value:
        return self._binary("sub", other)

    def __mul__(self, other: Value | Number) -> Value:
        return self._binary("mul", other)

    def __truediv__(self, other: Value | Number) -> Value:
        return self._binary("div", other)

    def __and__(self, other: Value | Number) -> Value:
        return self._binary("and", other)

    def __or__(self, other: Value | Number) -> Value:
        return self._binary("or", other)

    def __lshift__(self, other: Value | Number) -> Value:
        return self._binary("shl", other)

    def __rshift__(self, other: Value | Number) -> Value:
        return self._binary("lshr", other)

    def compare(self, relation: str, other: Value | Number) -> Value:
        """`eq`, `ne`, `lt`, `le`, `gt`, `ge`; integers as signed numbers."""
        signed = "" if relation in ("eq", "ne") else "s"
        code = f"fcmp o{relation}" if self._is_float() else f"icmp {signed}{relation}"
        lanes = lanes_of(self.kind)
        kind = vector(lanes, "i1") if lanes else "i1"
        return self.function.emit(kind, f"{code} {self}, {self._operand(other)}")

    def select(self, yes: Value, no: Value) -> Value:
        """`yes` where this condition holds, else `no`."""
        return self.function.emit(yes.kind, f"select {self}, {yes}, {no}")

    def cast(self, code: str, kind: str) -> Value:
        """Convert: `zext`, `sext`, `trunc`, `bitcast`, `sitofp`, `fptosi`, `ptrtoint` ..."""
        return self.function.emit(kind, f"{code} {self} to {kind}")

    def at(self, offset: Value | int) -> Value:
        """The pointer `offset` bytes further."""
        if isinstance(offset, int):
            return self if offset == 0 else self._at(f"i64 {offset}")
        return self._at(str(offset if offset.kind == "i64" else offset.cast("zext", "i64")))

    def _at(self, offset: str) -> Value:
        return self.function.emit("ptr", f"getelementptr i8, {self}, {offset}")

    def load(self, kind: str, align: int | None = None) -> Value:
        """What this pointer points at; `align` in bytes, of one element if not given."""
        return self.function.emit(kind, f"load {kind}, {self}, align {align or _size(kind)}")

    def store(self, value: Value, align: int | None = None) -> None:
        """Write where this pointer points."""
        self.function.do(f"store {value}, {self}, align {align or _size(value.kind)}")

    def prefetch(self, level: int = 3) -> None:
        """Ask for the cache line that this pointer points at; `level` 3 is L1, 2 is L2."""
        self.function.do(f"call void @llvm.prefetch.p0({self}, i32 0, i32 {level}, i32 1)")
        self.function.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")

    def splat(self, lanes: int) -> Value:
        """This scalar in every lane."""
        kind = vector(lanes, self.kind)
        one = self.function.emit(kind, f"insertelement {kind} poison, {self}, i64 0")
        zeros = literal(0, vector(lanes, "i32"))
        return self.function.emit(
            kind, f"shufflevector {one}, {kind} poison, {vector(lanes, 'i32')} {zeros}"
        )


def _size(kind: str) -> int:
    element = element_of(kind)
    return {"float": 4, "ptr": 8}.get(element) or max(int(element[1:]) // 8, 1)


@dataclass(frozen=True)
class Variable:
    """A place on the stack; LLVM keeps it in a register."""

    place: Value
    kind: str

    def get(self) -> Value:
        """The present value."""
        return self.place.load(self.kind)

    def set(self, value: Value) -> None:
        """Replace the value."""
        self.place.store(value)


class Function:
    """One kernel. Its arguments come in an array of 8-byte words, so that all kernels are called alike.

    Args:
        name: of the symbol.
        parameters: types and names, as `"ptr x"`, `"i64 count"`, `"float scale"`. Pointers do not
            overlap, unless listed in `shared`.
    """

    def __init__(self, name: str, parameters: Sequence[str], shared: Sequence[str] = ()) -> None:
        self.name, self.signature = name, tuple(parameters)
        self._kinds = [parameter.split()[0] for parameter in parameters]
        names = [parameter.split()[1] for parameter in parameters]
        self._attributes = [
            " noalias" if kind == "ptr" and name not in shared else ""
            for kind, name in zip(self._kinds, names, strict=True)
        ]
        self.parameters = [
            Value(self, kind, f"%{name}") for kind, name in zip(self._kinds, names, strict=True)
        ]
        self._lines: list[str] = []
        self._stack: list[str] = []
        self._declared: set[str] = set()
        self._count = 0

    def _fresh(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def emit(self, kind: str, code: str) -> Value:
        """Append an instruction that gives a value."""
        name = f"%{self._fresh()}"
        self._lines.append(f"  {name} = {code}")
        return Value(self, kind, name)

    def do(self, code: str) -> None:
        """Append an instruction that gives none."""
        self._lines.append(f"  {code}")

    def declare(self, line: str) -> None:
        """Declare a function of LLVM or of the process."""
        self._declared.add(line)

    def constant(self, number: Number, kind: str) -> Value:
        """A constant of a scalar or vector type."""
        return Value(self, kind, literal(number, kind))

    def variable(self, value: Value) -> Variable:
        """A new variable that holds `value`."""
        name = f"%{self._fresh()}"
        self._stack.append(f"  {name} = alloca {value.kind}")
        variable = Variable(Value(self, "ptr", name), value.kind)
        variable.set(value)
        return variable

    def scratch(self, size: int) -> Value:
        """`size` bytes on the stack, aligned to 64."""
        name = f"%{self._fresh()}"
        self._stack.append(f"  {name} = alloca i8, i64 {size}, align 64")
        return Value(self, "ptr", name)

    def table(self, name: str, content: bytes) -> Value:
        """The address of constant bytes, aligned to 64; of the same name in all functions, one."""
        text = "".join(f"\\{byte:02X}" for byte in content)
        self.declare(f'@{name} = internal constant [{len(content)} x i8] c"{text}", align 64')
        return Value(self, "ptr", f"@{name}")

    def call(self, kind: str, name: str, *operands: Value) -> Value:
        """Call a function without side effects, such as an intrinsic."""
        kinds = ", ".join(operand.kind for operand in operands)
        self.declare(f"declare {kind} @{name}({kinds})")
        return self.emit(kind, f"call {kind} @{name}({', '.join(map(str, operands))})")

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
            *self._stack,
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

    @property
    def declarations(self) -> set[str]:
        """The lines that declare what the function calls."""
        return self._declared
