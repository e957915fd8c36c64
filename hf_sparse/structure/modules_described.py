"""What modules are, without their values: classes, shapes, and the numbers that tell their place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_SCALARS = (bool, int, float, str, type(None))
# For each module, its class and the shapes of its tensors; its values.
Described = tuple[dict[str, Any], dict[str, Any]]


def described(module: nn.Module, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, Described]]:
    """For each module in a module, by its path: its class and the shapes of its tensors; its values.

    Args:
        module: the module.
        skip: paths that are left out, with all that is below them.
    """
    for path, part in module.named_modules():
        if any(f"{path}.".startswith(f"{name}.") for name in skip):
            continue
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
        values = {
            name: value
            for name, value in vars(part).items()
            if not name.startswith("_") and name != "training" and type(value) in _SCALARS
        }
        yield path, ({"": type(part).__qualname__, **shapes}, values)


def places_told(
    one: dict[str, Described], number: int, other: dict[str, Described], place: int
) -> list[tuple[str, str]] | None:
    """The attributes that tell the place of a block, by path and name.

    Args:
        one, other: the same block where it is, and where it is to be, described.
        number, place: of both.

    Returns:
        None if they differ in anything else.
    """
    if one.keys() != other.keys():
        return None
    changes = []
    for path, (shapes, values) in one.items():
        other_shapes, others = other[path]
        if shapes != other_shapes or values.keys() != others.keys():
            return None
        for name, value in values.items():
            told = type(value) is int and (value, others[name]) == (number, place)
            if told and number != place:
                changes.append((path, name))
            elif value != others[name]:
                return None
    return changes
