"""How kernels are called: by an operation, which is built and checked by the kernel's own parameters.

    COPY = Signature(("ptr x", "ptr y", "i64 vectors"))
    function = COPY.function("copy")            # whose code is then written
    operation = COPY.operation("copy", x=source, y=goal, vectors=4)

Addresses and integers are given as int, floats as float. Addresses of tensors that come and go with
a call, and numbers that change from call to call, are `Slot`s: a program fills them in when it runs.
Machine code reads its arguments from memory without looking at them, so `words` hands over nothing
but operations that were built by the parameters of the very kernel that they name.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from dataclasses import dataclass

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

    Raises:
        TypeError: there are more or fewer arguments than parameters, or one is of another kind.
    """

    kernel: str
    parameters: tuple[str, ...]
    arguments: tuple[Argument, ...]

    def __post_init__(self) -> None:
        if len(self.arguments) != len(self.parameters):
            raise TypeError(
                f"{self.kernel} has {len(self.arguments)} arguments; wanted {len(self.parameters)}: "
                f"{', '.join(self.parameters)}."
            )
        kinds, names = _kinds_and_names(self.parameters)
        for kind, name, argument in zip(kinds, names, self.arguments, strict=True):
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

    def function(self, name: str) -> Function:
        """The kernel `name`, without code as yet."""
        return Function(name, self.parameters, self.shared)

    def operation(self, kernel: str, **arguments: Argument) -> Operation:
        """Call `kernel` with an argument for each parameter.

        Raises:
            TypeError: a parameter has no argument or one of another kind, or an argument has no
                parameter.
        """
        _, names = _kinds_and_names(self.parameters)
        if len(arguments) != len(names) or not all(name in arguments for name in names):
            missing = ", ".join(name for name in names if name not in arguments)
            unknown = ", ".join(name for name in arguments if name not in names)
            problem = f"lacks {missing}" if missing else f"has no {unknown}"
            raise TypeError(f"{kernel} {problem}; wanted {', '.join(self.parameters)}.")
        return Operation(kernel, self.parameters, tuple(arguments[name] for name in names))


_LEAST, _MOST = -(1 << 63), (1 << 63) - 1
_WANTED = {
    "float": "a float",
    "i64": "an int of 64 bits, or a Slot",
    "ptr": "an address, which is an int from 0 on, or a Slot",
}


@functools.cache
def _kinds_and_names(parameters: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    split = [parameter.split() for parameter in parameters]
    return tuple(kind for kind, _ in split), tuple(name for _, name in split)


def _is(kind: str, argument: Argument) -> bool:
    """Whether an argument is of the kind of its parameter."""
    if kind == "float":
        return isinstance(argument, float)
    if type(argument) is int:
        return (0 if kind == "ptr" else _LEAST) <= argument <= _MOST
    return isinstance(argument, Slot)


def words(code: Code, operation: Operation) -> list[int]:
    """The kernel's address and its arguments as machine code reads them; 0 for slots.

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
    return [code.addresses[operation.kernel], *map(_word, operation.arguments)]


def _word(argument: Argument) -> int:
    if isinstance(argument, int):
        return argument
    if isinstance(argument, float):
        return int.from_bytes(struct.pack("<f", argument), "little")
    return 0


def run(code: Code, operation: Operation) -> None:
    """Call one kernel from Python, on this thread.

    Raises:
        TypeError: as `words`; or the operation has slots, which only a program fills in.
    """
    if any(isinstance(argument, Slot) for argument in operation.arguments):
        raise TypeError(f"{operation.kernel} has slots: run it by a Program.")
    address, *arguments = words(code, operation)
    memory = (ctypes.c_int64 * max(len(arguments), 1))(*arguments)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(ctypes.addressof(memory))
