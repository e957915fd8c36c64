"""Functions and classes that were exchanged: whether a class runs what its package wrote.

Machine code knows a class by its name. Whoever puts a function of their own in place of one of the
class's, or of one that these call, changes what the model computes, and not the name. A function tells
by its global names where it was written, also behind `functools.wraps`, which copies all else.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from hf_sparse.upstream.torch import AROUND_FORWARD
from hf_sparse.upstream.transformers.models import PUT_BY_DECORATORS, is_from_transformers

_PACKAGES = ("transformers", "torch", "typing_extensions", *sys.stdlib_module_names)


def why_not_own(kind: type) -> str | None:
    """What was put in place of a module class's functions, or of those that they call, or None."""
    seen: set[int] = set()
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(owner).items():
            if name.startswith("__") and name not in AROUND_FORWARD:
                continue
            for function in _functions_of(name, value):
                found = _exchanged(owner, name, function) or _calls_exchanged(name, function, seen)
                if found is not None:
                    return found
    for name in AROUND_FORWARD:
        found = None if name not in vars(nn.Module) else _foreign(vars(nn.Module)[name])
        if found is not None:
            return f"{name} was exchanged for {found}"
    return None


def why_not_own_function(function: Any) -> str | None:
    """What of a function of transformers, or of those that it calls, was exchanged, or None."""
    name = getattr(function, "__name__", type(function).__name__)
    found = _foreign(function)
    return found or _calls_exchanged(name, function, set())


def is_known(item: Any) -> bool:
    """Whether a function or class is one of transformers, torch or Python."""
    return _foreign(item) is None


def _functions_of(name: str, value: Any) -> Iterator[Any]:
    """The functions behind an attribute of a class: its own, a property's, a method's."""
    if isinstance(value, property):
        yield from (one for one in (value.fget, value.fset) if one is not None)
        return
    if isinstance(value, staticmethod | classmethod):
        yield value.__func__
        return
    descriptor = hasattr(type(value), "__get__") and not is_known(value)
    if isinstance(value, FunctionType) or descriptor or name in ("forward", *AROUND_FORWARD):
        yield value


def _exchanged(owner: type, name: str, function: Any) -> str | None:
    """Whether an attribute of a class is another function than the one that its class has by name."""
    place = owner.__module__, f"{owner.__qualname__}.{name}"
    origin = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    own = origin in (place, PUT_BY_DECORATORS.get(name))
    found = _foreign(function) or (None if own else ".".join(map(str, origin)))
    return None if found is None else f"{name} was exchanged for {found}"


def _foreign(item: Any) -> str | None:
    """The name of a function or class, if it was written elsewhere than in the known packages."""
    while isinstance(item, functools.partial):
        item = item.func
    for one in _layers(item):
        module = one.__globals__.get("__name__") or one.__module__
        if str(module).partition(".")[0] not in _PACKAGES:
            return f"{module}.{one.__code__.co_qualname}"
    if isinstance(item, FunctionType | BuiltinFunctionType):
        return None
    kind = item if isinstance(item, type) else type(item)
    known = str(kind.__module__).partition(".")[0] in (*_PACKAGES, "builtins")
    return None if known else f"{kind.__module__}.{kind.__qualname__}"


def _layers(item: Any) -> Iterator[FunctionType]:
    """A function, those that it wraps, and those that it was made with, as decorators make them."""
    waiting, seen = [item], set[int]()
    while waiting:
        function = waiting.pop()
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        yield function
        waiting.append(vars(function).get("__wrapped__"))
        for cell in function.__closure__ or ():
            try:
                waiting.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue


def _calls_exchanged(name: str, function: Any, seen: set[int]) -> str | None:
    """What a function calls, or the functions of transformers that it calls, that was exchanged."""
    for one in _layers(function):
        if id(one) in seen:
            continue
        seen.add(id(one))
        for used, called in _called(one):
            found = _foreign(called)
            if found is not None:
                return f"{name} calls {used}, which is {found}"
            if is_from_transformers(called):
                deeper = _calls_exchanged(used, called, seen)
                if deeper is not None:
                    return deeper
    return None


def _called(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function may call: what its global names stand for, and what torch's modules have."""
    names = list(_names_in(function.__code__))
    modules: list[ModuleType] = []
    for used in names:
        value = function.__globals__.get(used)
        if isinstance(value, ModuleType):
            modules.append(value)
        elif isinstance(value, FunctionType | type | functools.partial):
            yield used, value
    for module in modules:  # grows: torch.nn.functional
        if module.__name__.partition(".")[0] not in ("torch", "transformers"):
            continue
        for used in names:
            value = vars(module).get(used)
            if isinstance(value, ModuleType) and value not in modules:
                modules.append(value)
            elif callable(value) and not isinstance(value, type | ModuleType):
                yield used, value


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
