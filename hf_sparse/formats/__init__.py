"""Lossless storage of sparse weights: docs/format.md is the specification.

`compress` turns one 2-D weight into a few named tensors, `decompress` turns them back, bit for
bit (`-0.0` comes back as `0.0`). The part named "" holds the values and is stored under the
weight's own name, so that a loader that does not know the format meets a shape mismatch instead
of a missing weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_sparse.formats import bitmask, bits, block, gap, nm
from hf_sparse.formats.error import FormatError, locate
from hf_sparse.patterns import NM, GroupPattern, Pattern, Unstructured

__all__ = [
    "COMPANIONS",
    "FORMATS",
    "FormatError",
    "can_compress",
    "compress",
    "decompress",
    "group_parts",
    "join",
    "locate",
    "split_name",
]

# What `format=` accepts, and what each one stores beside the values.
FORMATS = {
    "auto": "the smallest of the others",
    "dense": "the weight as it is, zeros included",
    "bitmask": "one bit per weight",
    "gap4": "the zeros before each nonzero, in 4-bit codes",
    "gap8": "the zeros before each nonzero, in 8-bit codes",
    "nm": "the positions in each group of an N:M weight",
    "block": "one bit per block of a block, row, column or head pattern",
}
LAYOUT = "layout"
# The names of the parts that a weight may have beside its values.
COMPANIONS = ("bitmask", "gap4", "gap8", "nm", "block", LAYOUT)
_NUM_PARAMETERS = {"bitmask": 0, "gap4": 0, "gap8": 0, "nm": 2, "block": 2}
# The float types whose zeros are the bit patterns 0 and "sign bit alone". Of others (fp8 "fnuz",
# e8m0, packed fp4) those bits mean NaN or a power of two, and would be lost as zeros.
_FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
# A layout is believed up to this many weights: gap codes and blocks do not bound it by their size.
_LARGEST_WEIGHT = 2**40


def compress(
    weight: Tensor,
    format: str = "auto",
    pattern: Pattern | None = None,
    *,
    transposed: bool = False,
) -> dict[str, Tensor]:
    """Compress one weight, losslessly.

    Args:
        weight: 2-D, fp64, fp32, fp16, bf16 or fp8 (e4m3fn, e5m2), `(out_features, in_features)`,
            or its transpose.
        format: a key of `FORMATS`. `auto` takes the smallest of those that can hold the weight.
        pattern: what `nm` and `block` follow, and `auto` may use; `unstructured` if None.
        transposed: the weight is stored `(in_features, out_features)`, as GPT-2's `Conv1D` does.

    Returns:
        Parts by name, on the CPU: `""` the values, the format's own array under the format's
        name, and `layout`. Only `""` with the weight itself where dense is chosen.

    Raises:
        ValueError: unknown format, a weight that is not a 2-D float, or one that does not follow
            the pattern that the format needs.
    """
    pattern = Unstructured() if pattern is None else pattern
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}. Known formats: {', '.join(FORMATS)}.")
    if not can_compress(weight):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} and type {weight.dtype} cannot be compressed; "
            f"wanted a 2-D tensor of {', '.join(map(str, _FLOATS))}."
        )
    weight = weight.detach().cpu()
    if format == "dense":
        return {"": weight}
    if format != "auto":
        return _encode(weight, format, pattern, transposed)
    flat = bits.as_bits(weight).reshape(-1)
    mask = bits.nonzero_mask(flat)
    structured = _encode_structured(weight, pattern, transposed)
    # No unstructured format is smaller than the values and the shorter of bitmask and 4-bit gaps.
    nnz = int(np.count_nonzero(mask))
    least = nnz * weight.element_size() + min(-(-mask.size // 8), nnz // 2)
    candidates = [] if structured is None else [structured]
    if structured is None or num_bytes(structured) > least:
        candidates += _encode_unstructured(weight, flat, mask, nnz)
    return min([*candidates, {"": weight}], key=num_bytes)


def can_compress(weight: Tensor) -> bool:
    """Whether this is a 2-D tensor of a type that the formats hold."""
    return weight.ndim == 2 and weight.dtype in _FLOATS


def decompress(parts: Mapping[str, Tensor]) -> Tensor:
    """Rebuild a weight from the parts that `compress` gave, on the device of its values.

    Raises:
        FormatError: the parts contradict each other. Nothing is trusted: types, lengths, counts
            and ranges are checked before a weight is returned.
    """
    name, rows, columns, transposed, parameters = read_layout(parts)
    values = parts[""]
    stored = bits.as_bits(values.cpu())
    coded = parts[name].cpu().contiguous().numpy()
    try:
        if name == "bitmask":
            flat = bitmask.decode(stored, coded, rows * columns)
        elif name == "nm":
            flat = nm.decode(stored, coded, rows * columns, *parameters)
        elif name == "block":
            flat = block.decode(stored, coded, rows, columns, *parameters)
        else:
            flat = gap.decode(stored, coded, rows * columns, int(name.removeprefix("gap")))
    except MemoryError as error:
        raise FormatError(f"a weight of {rows} x {columns} does not fit in memory") from error
    weight = bits.as_weight(flat.reshape(rows, columns), values.dtype)
    return (weight.T.contiguous() if transposed else weight).to(values.device)


def read_layout(parts: Mapping[str, Tensor]) -> tuple[str, int, int, bool, tuple[int, ...]]:
    """Format name, rows, columns, transposed and parameters, with the types of all parts checked.

    Raises:
        FormatError: a part is missing or too many, or has the wrong type or shape.
    """
    names = sorted(set(parts) - {"", LAYOUT})
    if len(names) != 1 or LAYOUT not in parts or "" not in parts or names[0] not in _NUM_PARAMETERS:
        raise FormatError(
            f"found the parts {sorted(parts)}; wanted the values, '{LAYOUT}' and exactly one of "
            f"{', '.join(_NUM_PARAMETERS)}"
        )
    name, values, layout = names[0], parts[""], parts[LAYOUT]
    if values.ndim != 1 or values.dtype not in _FLOATS:
        raise FormatError(
            f"values have shape {tuple(values.shape)} and type {values.dtype}; wanted 1-D floats of "
            f"{', '.join(map(str, _FLOATS))}"
        )
    if parts[name].ndim != 1 or parts[name].dtype != torch.uint8:
        raise FormatError(
            f"'{name}' has shape {tuple(parts[name].shape)} and type {parts[name].dtype}; wanted "
            "1-D bytes"
        )
    return name, *parse_layout(name, layout)


def parse_layout(name: str, layout: Tensor) -> tuple[int, int, bool, tuple[int, ...]]:
    """Rows, columns, transposed and parameters, from the layout of a weight in format `name`.

    Raises:
        FormatError: it has the wrong type or shape, or holds what no weight has.
    """
    if layout.dtype != torch.int64 or layout.shape != (3 + _NUM_PARAMETERS[name],):
        raise FormatError(
            f"'{LAYOUT}' has shape {tuple(layout.shape)} and type {layout.dtype}; wanted "
            f"{3 + _NUM_PARAMETERS[name]} int64 for format '{name}'"
        )
    rows, columns, transposed, *parameters = layout.tolist()
    sizes_fit = 0 <= rows < 2**31 and 0 <= columns < 2**31 and transposed in (0, 1)
    sizes_fit &= rows * columns <= _LARGEST_WEIGHT
    if name == "nm":
        n, m = parameters
        sizes_fit &= 1 <= n < m <= nm.LARGEST_M and columns % max(m, 1) == 0
    if name == "block":
        height, width = parameters
        sizes_fit &= min(height, width) >= 1 and height * width <= _LARGEST_WEIGHT
    if not sizes_fit:
        raise FormatError(f"'{LAYOUT}' holds {layout.tolist()}, which is no layout of '{name}'")
    return rows, columns, bool(transposed), tuple(parameters)


def num_bytes(parts: Mapping[str, Tensor]) -> int:
    """Bytes that the parts take in a file, headers aside."""
    return sum(part.numel() * part.element_size() for part in parts.values())


def format_of(parts: Iterable[str]) -> str:
    """The name of the format that parts of these names belong to."""
    return next((part for part in parts if part not in ("", LAYOUT)), "dense")


def num_nonzeros(parts: Mapping[str, Tensor]) -> int:
    """Nonzero weights in the parts that `compress` gave, without restoring the weight."""
    if parts.keys() & {"bitmask", "gap4", "gap8"}:
        return parts[""].numel()
    return int(np.count_nonzero(bits.nonzero_mask(bits.as_bits(parts[""].cpu()))))


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


def _encode_structured(
    weight: Tensor, pattern: Pattern, transposed: bool
) -> dict[str, Tensor] | None:
    """The weight in the format of its pattern; None if the pattern has none, or does not hold."""
    name = "nm" if isinstance(pattern, NM) else "block"
    if isinstance(pattern, Unstructured) or (isinstance(pattern, NM) and pattern.m > nm.LARGEST_M):
        return None
    try:
        return _encode(weight, name, pattern, transposed)
    except ValueError:  # the pattern does not divide the weight, or the weight does not follow it
        return None


def _encode_unstructured(
    weight: Tensor, flat: bits.Bits, mask: NDArray[np.bool_], nnz: int
) -> list[dict[str, Tensor]]:
    """The smallest of bitmask and the gap codes that can be shorter; none if dense is."""
    if nnz * weight.element_size() + mask.size / 8 >= flat.nbytes:
        return []
    coded = {"bitmask": bitmask.encode(mask)}
    for name, width in (("gap4", 4), ("gap8", 8)):
        if nnz * width / 8 < min(array.nbytes for array in coded.values()):
            coded[name] = gap.encode(mask, width)
    name = min(coded, key=lambda key: coded[key].nbytes)
    return [_parts(weight, name, bits.take(flat, mask), coded[name])]


def _encode(weight: Tensor, name: str, pattern: Pattern, transposed: bool) -> dict[str, Tensor]:
    if name in ("bitmask", "gap4", "gap8"):
        flat = bits.as_bits(weight).reshape(-1)
        mask = bits.nonzero_mask(flat)
        if name == "bitmask":
            coded = bitmask.encode(mask)
        else:
            coded = gap.encode(mask, int(name.removeprefix("gap")))
        return _parts(weight, name, bits.take(flat, mask), coded)
    oriented = weight.T if transposed else weight
    weights = bits.as_bits(oriented)
    if name == "nm":
        if not isinstance(pattern, NM) or pattern.m > nm.LARGEST_M:
            raise ValueError(
                f"format 'nm' stores N:M patterns with M <= {nm.LARGEST_M}, not '{pattern}'. "
                "Use format 'auto'."
            )
        pattern.groups(oriented)  # raises where M does not divide in_features
        values, coded = nm.encode(weights.reshape(-1), pattern.n, pattern.m)
        parameters: tuple[int, int] = (pattern.n, pattern.m)
    else:
        if not isinstance(pattern, GroupPattern):
            raise ValueError(
                f"format 'block' stores block, row, column and head patterns, not '{pattern}'. "
                "Use format 'auto'."
            )
        pattern.blocks(oriented)  # raises where the groups do not tile the weight
        parameters = pattern.group_shape(*oriented.shape)
        values, coded = block.encode(weights, *parameters)
    return _parts(oriented, name, values, coded, transposed, parameters)


def _parts(
    weight: Tensor,
    name: str,
    values: bits.Bits,
    coded: NDArray[np.uint8],
    transposed: bool = False,
    parameters: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    layout = torch.tensor([*weight.shape, int(transposed), *parameters], dtype=torch.int64)
    return {
        "": bits.as_weight(values, weight.dtype),
        name: torch.from_numpy(np.ascontiguousarray(coded)),
        LAYOUT: layout,
    }
