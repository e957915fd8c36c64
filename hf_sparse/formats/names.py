"""The names of a weight's parts in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

from hf_sparse.formats.format import LAYOUT
from hf_sparse.formats.table import CODINGS, COMPANIONS, POSITIONS


def join(name: str, part: str) -> str:
    """The name in the checkpoint of a part of tensor `name`."""
    return f"{name}.{part}" if part else name


def split_name(key: str) -> tuple[str, str]:
    """The tensor and the part that a name in a checkpoint stands for: undoes `join`."""
    name, _, part = key.rpartition(".")
    return (name, part) if name and part in COMPANIONS else (key, "")


def group_parts(keys: Iterable[str]) -> dict[str, list[str]]:
    """The parts that each tensor has, from all names in a checkpoint.

    A name that only looks like a part (no tensor of that name) stands for itself.
    """
    keys = set(keys)
    grouped: dict[str, list[str]] = {}
    for key in sorted(keys):
        name, part = split_name(key)
        if name not in keys:
            name, part = key, ""
        grouped.setdefault(name, []).append(part)
    return grouped


def format_of(parts: Iterable[str]) -> str:
    """The name of the format that parts of these names belong to."""
    return next((part for part in parts if part in POSITIONS), "dense")


def coding_of(parts: Iterable[str]) -> str | None:
    """The name of the coding of the values; None: they are stored as they are."""
    return next((part for part in parts if part in CODINGS), None)


def storage_of(parts: Iterable[str]) -> str:
    """How parts of these names store a weight, in words: `nm`, or `nm, 4-bit codes`."""
    found = list(parts)
    coding = coding_of(found)
    codes = "" if coding is None else f", {CODINGS[coding].bits}-bit codes"
    return f"{format_of(found)}{codes}"


def are_complete(parts: Iterable[str]) -> bool:
    """Whether parts of these names make a compressed weight."""
    found = set(parts)
    coding = coding_of(found)
    others = found - {"", LAYOUT, format_of(found)}
    if coding is not None:
        others -= {coding, *CODINGS[coding].others}
    placed = coding is not None or format_of(found) != "dense"
    return {"", LAYOUT} <= found and placed and not others
