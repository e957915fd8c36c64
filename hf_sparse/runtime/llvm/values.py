"""Values of LLVM IR, with Python's operators, and the body of instructions that gives them.

Values are immutable; `Variable` is a place on the stack that LLVM turns into registers. Vectors
have their type written out, `<16 x float>`: nothing here is left to the auto-vectoriser.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
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


def _operator(name: str) -> Callable[[Value, Value | Number], Value]:
    """What a binary operator of Python writes for two values."""

    def write(one: Value, other: Value | Number) -> Value:
        code = (_FLOAT if one._is_float() else _INTEGER).get(name, name)
        return one.body.emit(one.kind, f"{code} {one}, {one._operand(other)}")

    return write


@dataclass(frozen=True)
class Value:
    """A number, a vector or a pointer inside a body."""

    body: Body
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

    __add__ = _operator("add")
    __sub__ = _operator("sub")
    __mul__ = _operator("mul")
    __truediv__ = _operator("div")
    __and__ = _operator("and")
    __or__ = _operator("or")
    __xor__ = _operator("xor")
    __lshift__ = _operator("shl")
    __rshift__ = _operator("lshr")

    def compare(self, relation: str, other: Value | Number) -> Value:
        """`eq`, `ne`, `lt`, `le`, `gt`, `ge`; integers as signed numbers."""
        signed = "" if relation in ("eq", "ne") else "s"
        code = f"fcmp o{relation}" if self._is_float() else f"icmp {signed}{relation}"
        lanes = lanes_of(self.kind)
        kind = vector(lanes, "i1") if lanes else "i1"
        return self.body.emit(kind, f"{code} {self}, {self._operand(other)}")

    def select(self, yes: Value, no: Value) -> Value:
        """`yes` where this condition holds, else `no`."""
        return self.body.emit(yes.kind, f"select {self}, {yes}, {no}")

    def cast(self, code: str, kind: str) -> Value:
        """Convert: `zext`, `sext`, `trunc`, `bitcast`, `sitofp`, `fptosi`, `ptrtoint` ..."""
        return self.body.emit(kind, f"{code} {self} to {kind}")

    def at(self, offset: Value | int) -> Value:
        """The pointer `offset` bytes further."""
        if isinstance(offset, int):
            return self if offset == 0 else self._at(f"i64 {offset}")
        return self._at(str(offset if offset.kind == "i64" else offset.cast("zext", "i64")))

    def _at(self, offset: str) -> Value:
        return self.body.emit("ptr", f"getelementptr i8, {self}, {offset}")

    def load(self, kind: str, align: int | None = None) -> Value:
        """What this pointer points at; `align` in bytes, of one element if not given."""
        return self.body.emit(kind, f"load {kind}, {self}, align {align or _size(kind)}")

    def store(self, value: Value, align: int | None = None) -> None:
        """Write where this pointer points."""
        self.body.do(f"store {value}, {self}, align {align or _size(value.kind)}")

    def prefetch(self, level: int = 3) -> None:
        """Ask for the cache line that this pointer points at; `level` 3 is L1, 2 is L2."""
        self.body.do(f"call void @llvm.prefetch.p0({self}, i32 0, i32 {level}, i32 1)")
        self.body.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")

    def splat(self, lanes: int) -> Value:
        """This scalar in every lane."""
        kind = vector(lanes, self.kind)
        one = self.body.emit(kind, f"insertelement {kind} poison, {self}, i64 0")
        zeros = literal(0, vector(lanes, "i32"))
        return self.body.emit(
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


class Body:
    """The instructions of a function, in the order in which they are written."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self.allocations: list[str] = []
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
        self.allocations.append(f"  {name} = alloca {value.kind}")
        variable = Variable(Value(self, "ptr", name), value.kind)
        variable.set(value)
        return variable

    def scratch(self, size: int) -> Value:
        """`size` bytes on the stack, aligned to 64."""
        name = f"%{self._fresh()}"
        self.allocations.append(f"  {name} = alloca i8, i64 {size}, align 64")
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

    @property
    def declarations(self) -> set[str]:
        """The lines that declare what the function calls."""
        return self._declared
