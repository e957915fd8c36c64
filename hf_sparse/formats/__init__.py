"""Lossless storage of sparse weights: docs/format.md is the specification.

`compress` turns one weight, a matrix or a stack of them, into a few named tensors, `decompress` turns
them back, bit for bit (`-0.0` comes back as `0.0`). The part named "" holds the values and is stored
under the weight's own name, so that a loader that does not know the format meets a shape mismatch
instead of a missing weight. Where values stand (`FORMATS`) and how they are written (as they are, or by
one of `CODINGS`) are two independent choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hf_sparse.formats import bits
from hf_sparse.formats.error import FormatError, locate
from hf_sparse.formats.format import LAYOUT, Format, Layout, Weight, num_bytes
from hf_sparse.formats.names import (
    are_complete,
    coding_of,
    format_of,
    group_parts,
    join,
    split_name,
    storage_of,
)
from hf_sparse.formats.smallest import smallest_of
from hf_sparse.formats.table import CODINGS, COMPANIONS, FORMATS, POSITIONS
from hf_sparse.patterns import Pattern, Unstructured
from hf_sparse.quantization import Codes, Grid

__all__ = [
    "CODINGS",
    "COMPANIONS",
    "FORMATS",
    "POSITIONS",
    "Format",
    "FormatError",
    "Layout",
    "Weight",
    "are_complete",
    "can_compress",
    "codes_in",
    "coding_of",
    "compress",
    "decompress",
    "format_of",
    "group_parts",
    "join",
    "layout_in",
    "locate",
    "num_bytes",
    "read_layout",
    "smallest_of",
    "split_name",
    "storage_of",
]

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
# Coded weights that are multiplied by their scales together.
_CHUNK = 2**22


def compress(
    weight: Tensor,
    format: str = "auto",
    pattern: Pattern | None = None,
    *,
    transposed: bool = False,
    grid: Grid | None = None,
) -> dict[str, Tensor]:
    """Compress one weight, losslessly.

    Args:
        weight: fp64, fp32, fp16, bf16 or fp8 (e4m3fn, e5m2), `(out_features, in_features)`, or its
            transpose; or a stack of such matrices, `(matrices, out_features, in_features)`, each of
            which follows the pattern.
        format: a key of `FORMATS`. `auto` takes the smallest of those that can hold the weight.
        pattern: what `nm` and `block` follow, and `auto` may use; `unstructured` if None.
        transposed: the weight is stored `(in_features, out_features)`, as GPT-2's `Conv1D` does.
        grid: that the weight lies on: its codes and scales are stored, which `decompress` multiplies.
            None: it may have any values.

    Returns:
        Parts by name, on the CPU: `""` the values, the format's own array under the format's
        name, `layout`, and what the coding of `grid` adds. Only `""` with the weight itself where
        dense is chosen without a grid.

    Raises:
        OffGridError: weights that are not on the grid.
        ValueError: unknown format, a weight that is no matrix of floats, or one that does not follow
            the pattern that the format needs.
    """
    pattern = Unstructured() if pattern is None else pattern
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}. Known formats: {', '.join(FORMATS)}.")
    if not can_compress(weight):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} and type {weight.dtype} cannot be compressed; "
            f"wanted a 2-D or 3-D tensor of {', '.join(map(str, _FLOATS))}."
        )
    stored = Weight(weight.detach().cpu(), transposed)
    if grid is not None:
        coding = CODINGS[f"scales{grid.bits}"]
        return coding.compress(stored, FORMATS[format], pattern, grid)
    return FORMATS[format].compress(stored, pattern).parts()


def can_compress(weight: Tensor) -> bool:
    """Whether this is a matrix, or a stack of them, of a type that the formats hold."""
    return weight.ndim in (2, 3) and weight.dtype in _FLOATS


def decompress(parts: Mapping[str, Tensor], layout: Layout | None = None) -> Tensor:
    """Rebuild a weight from the parts that `compress` gave, on the device of its values.

    Coded values come back as float32: the exact products of codes and scales.

    Args:
        parts: of the weight.
        layout: what `read_layout` gave for these parts; None: it is read.

    Raises:
        FormatError: the parts contradict each other. Nothing is trusted: types, lengths, counts
            and ranges are checked before a weight is returned.
    """
    layout, values = layout or read_layout(parts), parts[""]
    rows, columns = layout.all_rows, layout.columns
    try:
        if layout.coding is not None:
            flat = _products(codes_in(parts))
        else:
            decode = FORMATS[layout.format].decode
            assert decode is not None  # `read_layout` has refused the others
            stored = bits.as_bits(values.cpu())
            positions = parts[layout.format].cpu().contiguous().numpy()
            placed = decode(stored, positions, rows, columns, *layout.parameters)
            flat = bits.as_weight(placed, values.dtype)
    except MemoryError as error:
        raise FormatError(f"a weight of {rows} x {columns} does not fit in memory") from error
    stacked = () if layout.matrices is None else (layout.matrices,)
    weight = flat.reshape(*stacked, layout.rows, columns)
    return (weight.mT.contiguous() if layout.transposed else weight).to(values.device)


def codes_in(parts: Mapping[str, Tensor]) -> Codes:
    """The codes and scales of a weight that was compressed with a grid, on the CPU.

    Returns:
        Of a matrix `(out_features, in_features)`; of a stack the matrices one below the other.

    Raises:
        FormatError: as `decompress`, or the values are not coded.
    """
    layout = read_layout(parts)
    if layout.coding is None:
        raise FormatError(f"found the parts {sorted(parts)}; wanted {' or '.join(CODINGS)}")
    return CODINGS[layout.coding].codes(layout, FORMATS[layout.format], parts)


def _products(codes: Codes) -> Tensor:
    """The weights, some rows at a time: no second copy of them is made."""
    weight = torch.from_numpy(np.empty(codes.codes.shape, np.float32))
    step = max(1, _CHUNK // max(weight.shape[1], 1))
    for start in range(0, len(weight) if weight.numel() else 0, step):
        part = slice(start, start + step)
        weight[part] = Codes(codes.codes[part], codes.scales[part]).weight()
    return weight


def read_layout(parts: Mapping[str, Tensor]) -> Layout:
    """The layout, with the types of all parts checked.

    Raises:
        FormatError: a part is missing or too many, or has the wrong type or shape.
    """
    if not are_complete(parts):
        raise FormatError(
            f"found the parts {sorted(parts)}; wanted the values, '{LAYOUT}' and exactly one of "
            f"{', '.join(POSITIONS)}. Coded values have one of {', '.join(CODINGS)}, too, and need no "
            "positions"
        )
    values, name, coded = parts[""], format_of(parts), coding_of(parts) is not None
    if values.ndim != 1 or values.dtype not in ((torch.uint8,) if coded else _FLOATS):
        wanted = "bytes" if coded else f"floats of {', '.join(map(str, _FLOATS))}"
        raise FormatError(
            f"values have shape {tuple(values.shape)} and type {values.dtype}; wanted 1-D {wanted}"
        )
    if name in parts and (parts[name].ndim != 1 or parts[name].dtype != torch.uint8):
        raise FormatError(
            f"'{name}' has shape {tuple(parts[name].shape)} and type {parts[name].dtype}; wanted "
            "1-D bytes"
        )
    return layout_in(parts, parts[LAYOUT])


def layout_in(names: Iterable[str], layout: Tensor) -> Layout:
    """The layout of a weight with parts of these names.

    Raises:
        FormatError: it has the wrong type or shape, or holds what no weight has.
    """
    names = list(names)
    return replace(FORMATS[format_of(names)].read_layout(layout), coding=coding_of(names))
