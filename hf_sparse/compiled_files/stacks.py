"""The stacks of a model as tensors and descriptions: of most models one, of others two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_sparse.runtime.model.families import COMPILED, NAMES
from hf_sparse.runtime.model.state import restore_stack, stack_state
from hf_sparse.runtime.weights.damage import require
from hf_sparse.runtime.weights.stack import Stack
from hf_sparse.structure.families import base_type

_ONE, _SEVERAL = "stack.", "stacks."
# What the names of packed tensors begin with.
PREFIXES = (_ONE, _SEVERAL)


def stacks_state(
    family: str, stacks: Mapping[str, Stack]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a model's stacks.

    Of families with one stack it is described beside all else; those of others are a list.

    Args:
        family: of the model.
        stacks: by the places of their blocks in the base model.
    """
    if base_type(family) in COMPILED:
        (stack,) = stacks.values()
        tensors, description = stack_state(stack)
        return {f"{_ONE}{name}": tensor for name, tensor in tensors.items()}, description
    stored: dict[str, Tensor] = {}
    described = []
    for number, (place, stack) in enumerate(stacks.items()):
        tensors, description = stack_state(stack)
        stored |= {f"{_SEVERAL}{number}.{name}": tensor for name, tensor in tensors.items()}
        described.append({"place": place, **description})
    return stored, {"stacks": described}


def restore_stacks(
    family: str, tensors: Mapping[str, Tensor], described: Mapping[str, Any]
) -> dict[str, Stack]:
    """Undo `stacks_state`, and check everything that a kernel would follow.

    Raises:
        ValueError: something is missing, or does not fit; the message names it.
    """
    if base_type(family) not in NAMES:
        raise ValueError(f"family {base_type(family)!r} is not one of {', '.join(NAMES)}")
    if base_type(family) in COMPILED:
        place = COMPILED[base_type(family)].stack
        return {place: restore_stack(under(_ONE, tensors), described)}
    listed = described.get("stacks")
    require(isinstance(listed, list) and 1 <= len(listed) <= 2, "file", "the number of its stacks")
    packed = [name for name in tensors if name.startswith(PREFIXES)]
    known = tuple(f"{_SEVERAL}{number}." for number, _ in enumerate(listed or []))
    extra = [name for name in packed if not name.startswith(known)]
    require(not extra, "file", f"the tensors {extra[:3]}, which it does not need")
    return {
        str(one.get("place")): restore_stack(under(prefix, tensors), one)
        for prefix, one in zip(known, listed or [], strict=True)
    }


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
