"""Changes of JSON and safetensors files that know how they are built, and of plain bytes."""

from __future__ import annotations

import copy
import json
from typing import Any

from tests.fuzz.choices import Choices

VALUES: list[Any] = [
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    2**31,
    2**31 - 1,
    2**32,
    2**62,
    2**63,
    -(2**62),
    10**30,
]
VALUES += [0.5, -0.0, 1e300, 5e-324, float("nan"), float("inf"), True, False, None, "", "x", "../x"]
VALUES += [
    "/etc/passwd",
    "x" * 5000,
    "(a+)+b",
    "\x00",
    "\ud800",
    "__class__",
    "torch.int8",
    "float32",
]
VALUES += [[], {}, [0], [[]], {"a": 1}, [1] * 100]
_DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "X", ""]


def change(name: str, content: bytes, choices: Choices) -> bytes:
    """Change a file once, by its name's ending."""
    if choices.once_in(12):
        return change_bytes(content, choices)
    if name.endswith(".json"):
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            return change_bytes(content, choices)
        return json.dumps(change_json(values, choices)).encode("utf-8", "surrogatepass")
    if name.endswith(".safetensors"):
        return change_tensors(content, choices)
    return change_bytes(content, choices)


def change_bytes(content: bytes, choices: Choices) -> bytes:
    """Cut, flip, insert or repeat bytes."""
    at = choices.number(len(content) + 1)
    how = choices.number(5)
    if how == 0:
        return content[:at]
    if how == 1:
        return content[:at] + bytes([choices.number(256)]) + content[at + 1 :]
    if how == 2:
        piece = bytes(choices.number(256) for _ in range(1 + choices.number(8)))
        return content[:at] + piece + content[at:]
    if how == 3:
        return content[:at] + content[at + 1 + choices.number(64) :]
    return content + content[at : at + 1 + choices.number(256)]


def change_json(values: Any, choices: Choices) -> Any:
    """Change one value somewhere in a tree, in place: replaced, removed, moved, or nested deeply."""
    owner: Any = values
    while True:
        if not isinstance(owner, dict | list) or not owner:
            return choices.pick(VALUES)
        keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        key = choices.pick(keys)
        inner = owner[key]
        if not isinstance(inner, dict | list) or not inner or choices.once_in(6):
            break
        owner = inner
    _change_entry(owner, key, choices)
    return values


def _change_entry(owner: Any, key: Any, choices: Choices) -> None:
    old, how = owner[key], choices.number(8)
    if how == 0:
        del owner[key]
    elif how == 1 and isinstance(old, int):
        owner[key] = int(old) + choices.pick([1, -1, 2, 4, -4, 16, 64, 2**31])
    elif how == 2 and isinstance(owner, dict):
        owner[choices.pick(["x", "", "version", "bits", str(key) + "s", "a" * 300])] = old
    elif how == 3 and isinstance(owner, list):
        owner.extend([old] * (1 + choices.number(70)))
    elif how == 4 and isinstance(old, str) and old:
        at = choices.number(len(old))
        owner[key] = (
            old[:at] + choices.pick(["", "*", "\\", "/", "[", "é", "0", ":"]) + old[at + 1 :]
        )
    elif how == 5:
        for _ in range(1 + choices.number(300)):
            old = [old]
        owner[key] = old
    elif how == 6 and isinstance(owner, dict):
        other = choices.pick(list(owner))
        owner[key], owner[other] = owner[other], owner[key]
    else:
        owner[key] = copy.deepcopy(choices.pick(VALUES))


def change_tensors(content: bytes, choices: Choices) -> bytes:
    """Change the header of a safetensors file, or some numbers of a tensor."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return change_bytes(content, choices)
    names = [name for name in header if name != "__metadata__"]
    if not names or not isinstance(header, dict):
        return change_bytes(content, choices)
    body = bytearray(content[8 + length :])
    name = choices.pick(names)
    if choices.once_in(3):
        _change_header(header, name, names, choices)
    else:
        _change_numbers(header[name], body, choices)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(body)


def _change_header(header: dict[str, Any], name: str, names: list[str], choices: Choices) -> None:
    entry, how = header[name], choices.number(7)
    if how == 0:
        del header[name]
    elif how == 1:
        header[choices.pick([f"{name}.layout", f"{name}x", "w", name.rpartition(".")[0]])] = entry
    elif how == 2:
        other = choices.pick(names)
        header[name], header[other] = header[other], header[name]
    elif how == 3 and isinstance(entry, dict):
        entry["dtype"] = choices.pick(_DTYPES)
    elif how == 4 and isinstance(entry, dict) and isinstance(entry.get("shape"), list):
        shape = entry["shape"]
        entry["shape"] = choices.pick([shape[::-1], [*shape, 1], shape[1:], [1, *shape], [0], []])
    elif how == 5:
        header["__metadata__"] = {"format": "pt", "told": choices.pick(["", "{}", "[", "x" * 9])}
    else:
        header[name] = change_json(entry, choices)


def _change_numbers(entry: Any, body: bytearray, choices: Choices) -> None:
    try:
        begin, end = (int(place) for place in entry["data_offsets"])
        size = {"64": 8, "32": 4, "16": 2}.get(str(entry["dtype"])[-2:], 1)
    except (TypeError, ValueError, KeyError, OverflowError):
        return
    begin, end = max(min(begin, len(body)), 0), max(min(end, len(body)), 0)
    count = (end - begin) // size
    if count <= 0:
        return
    at, how = begin + size * choices.number(count), choices.number(5)
    if how == 0:
        number = choices.pick([0, 1, -1, 2, 127, 128, 2**31, 2**62, 0x7F800000, 0x7FC00000])
        body[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    elif how == 1:
        number = int.from_bytes(body[at : at + size], "little") + choices.pick(
            [1, -1, 2, 4, -4, 64]
        )
        body[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    elif how == 2:
        body[at] ^= 1 << choices.number(8)
    elif how == 3:
        other = begin + size * choices.number(count)
        body[at : at + size], body[other : other + size] = (
            body[other : other + size],
            body[at : at + size],
        )
    else:
        body[at:end] = bytes([choices.pick([0, 255, 127, 1])]) * (end - at)
