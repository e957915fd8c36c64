"""Lossless storage of sparse weights: docs/format.md is the specification.

`compress` turns one weight, a matrix or a stack of them, into a few named tensors, `decompress` turns
them back, bit for bit (`-0.0` comes back as `0.0`). The part named "" holds the values and is stored
under the weight's own name, so that a loader that does not know the format meets a shape mismatch
instead of a missing weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_sparse.formats import bits
from hf_sparse.formats.error import FormatError, locate
from hf_sparse.formats.format import LAYOUT, Format, Layout, Weight, num_bytes
from hf_sparse.formats.names import format_of, group_parts, join, split_name
from hf_sparse.formats.smallest import smallest_of
from hf_sparse.formats.table import COMPANIONS, FORMATS
from hf_sparse.patterns import Pattern, Unstructured

__all__ = [
    "COMPANIONS",
    "FORMATS",
    "Format",
    "FormatError",
    "Layout",
    "Weight",
    "can_compress",
    "compress",
    "decompress",
    "format_of",
    "group_parts",
    "join",
    "locate",
    "num_bytes",
    "read_layout",
    "smallest_of",
    "split_name",
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


def compress(
    weight: Tensor,
    format: str = "auto",
    pattern: Pattern | None = None,
    *,
    transposed: bool = False,
) -> dict[str, Tensor]:
    """Compress one weight, losslessly.

    Args:
        weight: fp64, fp32, fp16, bf16 or fp8 (e4m3fn, e5m2), `(out_features, in_features)`, or its
            transpose; or a stack of such matrices, `(matrices, out_features, in_features)`, each of
            which follows the pattern.
        format: a key of `FORMATS`. `auto` takes the smallest of those that can hold the weight.
        pattern: what `nm` and `block` follow, and `auto` may use; `unstructured` if None.
        transposed: the weight is stored `(in_features, out_features)`, as GPT-2's `Conv1D` does.

    Returns:
        Parts by name, on the CPU: `""` the values, the format's own array under the format's
        name, and `layout`. Only `""` with the weight itself where dense is chosen.

    Raises:
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
    encoded = FORMATS[format].compress(Weight(weight.detach().cpu(), transposed), pattern)
    return encoded.parts()


def can_compress(weight: Tensor) -> bool:
    """Whether this is a matrix, or a stack of them, of a type that the formats hold."""
    return weight.ndim in (2, 3) and weight.dtype in _FLOATS


def decompress(parts: Mapping[str, Tensor]) -> Tensor:
    """Rebuild a weight from the parts that `compress` gave, on the device of its values.

    Raises:
        FormatError: the parts contradict each other. Nothing is trusted: types, lengths, counts
            and ranges are checked before a weight is returned.
    """
    layout, values = read_layout(parts), parts[""]
    decode = FORMATS[layout.format].decode
    assert decode is not None  # `read_layout` has refused the others
    stored = bits.as_bits(values.cpu())
    positions = parts[layout.format].cpu().contiguous().numpy()
    rows, columns = layout.all_rows, layout.columns
    try:
        flat = decode(stored, positions, rows, columns, *layout.parameters)
    except MemoryError as error:
        raise FormatError(f"a weight of {rows} x {columns} does not fit in memory") from error
    stacked = () if layout.matrices is None else (layout.matrices,)
    weight = bits.as_weight(flat.reshape(*stacked, layout.rows, columns), values.dtype)
    return (weight.mT.contiguous() if layout.transposed else weight).to(values.device)


def read_layout(parts: Mapping[str, Tensor]) -> Layout:
    """The layout, with the types of all parts checked.

    Raises:
        FormatError: a part is missing or too many, or has the wrong type or shape.
    """
    names = sorted(set(parts) - {"", LAYOUT})
    known = [companion for companion in COMPANIONS if companion != LAYOUT]
    if len(names) != 1 or LAYOUT not in parts or "" not in parts or names[0] not in known:
        raise FormatError(
            f"found the parts {sorted(parts)}; wanted the values, '{LAYOUT}' and exactly one of "
            f"{', '.join(known)}"
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
    return FORMATS[name].read_layout(layout)
