"""How kernels are called: by an operation, which is built and checked by the kernel's own parameters.

    COPY = Signature(("ptr x", "ptr y", "i64 vectors"))
    function = COPY.function("copy", extents)   # whose code is then written
    operation = COPY.operation("copy", x=source, y=goal, vectors=4)

Addresses and integers are given as int, floats as float. Addresses of tensors that come and go with
a call, and numbers that change from call to call, are `Slot`s: a program fills them in when it runs.
Machine code reads its arguments from memory without looking at them, so `write` hands over nothing
but operations that were built by the parameters of the very kernel that they name.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from hf_sparse.runtime.kernels.extents import Extents
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.jit import Code


@dataclass(frozen=True)
class Slot:
    """`offset` bytes behind the address that a call gives for `name`."""

    name: str
    offset: int = 0

    def __add__(self, offset: int) -> Slot:
        return Slot(self.name, self.offset + offset)


Argument = int | float | Slot


@dataclass(frozen=True)
class Operation:
    """One call of a kernel; `Signature.operation` makes it.

    Attributes:
        kernel: its name.
        parameters: of the kernel, kind and name of each.
        arguments: in the order of the parameters.
        layout: how the arguments lie in memory.

    Raises:
        TypeError: there are more or fewer arguments than parameters, or one is of another kind.
    """

    kernel: str
    parameters: tuple[str, ...]
    arguments: tuple[Argument, ...]
    layout: Layout = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        layouts = _parameters(self.parameters).layouts
        types = tuple(map(type, self.arguments))
        layout = layouts.get(types)
        if layout is None:
            self._check()
            layout = layouts[types] = _layout(types)
        integers = layout.integers(self.arguments)
        # What is no address may be negative, which is rare.
        if integers and (min(integers) < 0 or max(integers) > _MOST):
            self._check()
        object.__setattr__(self, "layout", layout)

    def _check(self) -> None:
        """Check the count of the arguments, and the kind of each."""
        if len(self.arguments) != len(self.parameters):
            raise TypeError(
                f"{self.kernel} has {len(self.arguments)} arguments; wanted {len(self.parameters)}: "
                f"{', '.join(self.parameters)}."
            )
        split = _parameters(self.parameters)
        for kind, name, argument in zip(split.kinds, split.names, self.arguments, strict=True):
            if not _is(kind, argument):
                raise TypeError(f"{self.kernel} has {name}={argument!r}; wanted {_WANTED[kind]}.")


@dataclass(frozen=True)
class Signature:
    """The parameters of a kernel.

    Attributes:
        parameters: kind and name of each, as `"ptr x"`, `"i64 count"`, `"float scale"`.
        shared: pointers that may overlap.
    """

    parameters: tuple[str, ...]
    shared: tuple[str, ...] = ()

    def function(self, name: str, extents: Extents) -> Function:
        """The kernel `name`, without code as yet.

        Args:
            name: of the symbol.
            extents: what a call reads and writes.
        """
        return Function(name, self.parameters, self.shared, extents)

    def operation(self, kernel: str, **arguments: Argument) -> Operation:
        """Call `kernel` with an argument for each parameter.

        Raises:
            TypeError: a parameter has no argument or one of another kind, or an argument has no
                parameter.
        """
        split = _parameters(self.parameters)
        try:
            ordered = split.in_order(arguments)
        except KeyError:
            ordered = ()
        if len(ordered) != len(arguments):
            missing = ", ".join(name for name in split.names if name not in arguments)
            unknown = ", ".join(name for name in arguments if name not in split.names)
            problem = f"lacks {missing}" if missing else f"has no {unknown}"
            raise TypeError(f"{kernel} {problem}; wanted {', '.join(self.parameters)}.")
        return Operation(kernel, self.parameters, ordered)


def parameters(listed: str) -> tuple[str, ...]:
    """The parameters of a `Signature`, from a list such as `"ptr x, i64 count, float scale"`."""
    return tuple(listed.split(", "))


_LEAST, _MOST = -(1 << 63), (1 << 63) - 1
_WANTED = {
    "float": "a float",
    "i64": "an int of 64 bits, or a Slot",
    "ptr": "an address, which is an int from 0 on, or a Slot",
}


def _is(kind: str, argument: Argument) -> bool:
    """Whether an argument is of the kind of its parameter."""
    if kind == "float":
        return isinstance(argument, float)
    if type(argument) is int:
        return (0 if kind == "ptr" else _LEAST) <= argument <= _MOST
    return isinstance(argument, Slot)


Pick = Callable[[Any], tuple[Any, ...]]


def _pick(keys: Sequence[Any]) -> Pick:
    """What gives the items of these keys, in their order."""
    if len(keys) > 1:
        return itemgetter(*keys)
    return lambda items: tuple(items[key] for key in keys)


@dataclass(frozen=True)
class Layout:
    """How arguments of certain types lie in memory, behind the kernel's address, in words.

    Attributes:
        words: all of them, 0 for slots.
        integers, given: what picks the integers, and what is no slot, from the arguments.
        slots: which arguments are slots.
    """

    words: struct.Struct
    integers: Pick
    given: Pick
    slots: tuple[int, ...]


def _layout(types: Sequence[type]) -> Layout:
    kinds = ["8x" if issubclass(t, Slot) else "q" if t is int else "f4x" for t in types]
    return Layout(
        struct.Struct("=q" + "".join(kinds)),
        _pick([place for place, kind in enumerate(kinds) if kind == "q"]),
        _pick([place for place, kind in enumerate(kinds) if kind != "8x"]),
        tuple(place for place, kind in enumerate(kinds) if kind == "8x"),
    )


@dataclass(frozen=True)
class _Parameters:
    """The parameters of a kernel, read once.

    Attributes:
        kinds, names: of each.
        in_order: what puts arguments that have these names in order.
        layouts: by types of arguments, of those that are of the right kinds.
    """

    kinds: tuple[str, ...]
    names: tuple[str, ...]
    in_order: Pick
    layouts: dict[tuple[type, ...], Layout]


@functools.cache
def _parameters(parameters: tuple[str, ...]) -> _Parameters:
    split = [parameter.split() for parameter in parameters]
    kinds, names = tuple(kind for kind, _ in split), tuple(name for _, name in split)
    return _Parameters(kinds, names, _pick(names), {})


def write(code: Code, operation: Operation, memory: Any, offset: int = 0) -> None:
    """Write a kernel's address and its arguments as machine code reads them; 0 for slots.

    Args:
        code: has the kernel.
        operation: which kernel, and the arguments.
        memory: any buffer; struct.error if it is too short.
        offset: bytes before what is written.

    Raises:
        TypeError: there is no such kernel, or it has other parameters than the operation.
    """
    parameters = code.parameters.get(operation.kernel)
    if parameters != operation.parameters:
        has = "which there is not" if parameters is None else f"whose are {parameters}"
        raise TypeError(
            f"an operation was built with the parameters {operation.parameters} for the kernel "
            f"{operation.kernel}, {has}."
        )
    layout, arguments = operation.layout, operation.arguments
    given = layout.given(arguments) if layout.slots else arguments
    layout.words.pack_into(memory, offset, code.addresses[operation.kernel], *given)


def run(code: Code, operation: Operation) -> None:
    """Call one kernel from Python, on this thread.

    Raises:
        TypeError: as `write`; or the operation has slots, which only a program fills in.
    """
    if operation.layout.slots:
        raise TypeError(f"{operation.kernel} has slots: run it by a Program.")
    memory = (ctypes.c_int64 * (1 + len(operation.arguments)))()
    write(code, operation, memory)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(memory[0])(ctypes.addressof(memory) + 8)
