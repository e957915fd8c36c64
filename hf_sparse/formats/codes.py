"""Codings `scales8` and `scales4`: codes of 8 or 4 bits, and a scale for each group of a row.

    values                  codes modulo 2**bits; of 4 bits two in a byte, the low half first
    scales8, scales4 (rows, groups)  BF16; the name tells the bits. Those of 4 bits without zero points
                            may be negative
    zero_points (bytes,)    of grids that are not symmetric: a number of so many bits for each group,
                            packed as the values are

    weight = scale * code,   code = (value + zero_point) mod 2**bits - zero_point

Symmetric grids have the zero point 2**(bits - 1), which makes a value a number in two's complement. The
value 0 is the code 0 whatever the zero point, so that formats find zeros without knowing any.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_sparse.formats import bits as packing
from hf_sparse.formats.coding import Coding
from hf_sparse.formats.error import FormatError
from hf_sparse.formats.format import Parts
from hf_sparse.quantization import GROUP_SIZES, Codes, Grid, codes_of
from hf_sparse.quantization.grid import LARGEST_SCALE, SMALLEST_SCALE

ZERO_POINTS = "zero_points"
# Numbers that are looked at together: bounds the memory beside the codes.
_CHUNK = 2**22


def encode(bits: int, matrix: Tensor, grid: Grid) -> tuple[Tensor, Parts]:
    """The codes modulo 2**bits, and the scales and zero points.

    Raises:
        OffGridError: the matrix is not on the grid.
    """
    found = codes_of(matrix, grid)
    parts = {f"scales{bits}": found.scales.bfloat16()}
    if not grid.symmetric:
        size = grid.columns_per_scale(matrix.shape[1])
        lowest = found.codes.reshape(-1, size).amin(-1).clamp(max=0)
        zero_points = (-lowest).reshape(-1).to(torch.uint8).numpy()
        parts[ZERO_POINTS] = torch.from_numpy(packing.pack(zero_points, bits))
    return found.codes.to(torch.int16).bitwise_and_(2**bits - 1), parts


def check(bits: int, parts: Mapping[str, Tensor], rows: int, columns: int) -> None:
    """Refuse scales and zero points that no matrix of this shape has."""
    name = f"scales{bits}"
    scales = parts[name]
    if scales.dtype != torch.bfloat16 or scales.ndim != 2 or len(scales) != rows:
        raise FormatError(
            f"'{name}' has shape {tuple(scales.shape)} and type {scales.dtype}; wanted bfloat16 of "
            f"shape ({rows}, groups)"
        )
    groups = scales.shape[1]
    sizes = {columns, *(size for size in GROUP_SIZES if size)}
    whole = groups * (columns // groups) == columns if groups else columns == 0
    if not whole or (groups and columns // groups not in sizes):
        known = ", ".join(str(size) for size in GROUP_SIZES if size)
        raise FormatError(
            f"'{name}' has {groups} groups for {columns} columns; wanted groups of {known}, or of "
            "all columns"
        )
    signs = Grid(bits, None, ZERO_POINTS not in parts).has_signs
    values = scales.float().abs() if signs else scales.float()
    usable = (values >= SMALLEST_SCALE) & (values <= LARGEST_SCALE)  # False of NaN
    if not bool(usable.all()):
        raise FormatError(
            f"{int((~usable).sum())} of {values.numel()} scales in '{name}' are zero, "
            f"{'' if signs else 'negative, '}too small, too large or NaN; wanted from "
            f"{SMALLEST_SCALE:g} to {LARGEST_SCALE:g}{', or their opposites' if signs else ''}"
        )
    _check_zero_points(bits, parts.get(ZERO_POINTS), scales.numel())


def _check_zero_points(bits: int, stored: Tensor | None, count: int) -> None:
    if stored is None:
        return
    wanted = -(-count * bits // 8)
    if stored.dtype != torch.uint8 or stored.shape != (wanted,):
        raise FormatError(
            f"'{ZERO_POINTS}' has shape {tuple(stored.shape)} and type {stored.dtype}; wanted "
            f"{wanted} bytes for {count} groups"
        )
    if bits == 4 and count % 2 and int(stored[-1]) >> 4:
        raise FormatError(f"'{ZERO_POINTS}' holds a number behind the last group, {count - 1}")


def decode(bits: int, numbers: NDArray[np.uint8], parts: Mapping[str, Tensor]) -> Codes:
    """The codes and scales.

    Raises:
        FormatError: a code that symmetric grids do not have.
    """
    scales = parts[f"scales{bits}"].cpu().float()
    values = torch.from_numpy(np.ascontiguousarray(numbers))
    if ZERO_POINTS not in parts:
        codes = values.view(torch.int8)
        if bits == 4:
            return Codes(codes.bitwise_xor(8).sub_(8), scales)
        if bool((codes == -128).any()):
            raise FormatError("values hold the code -128; wanted codes in [-127, 127]")
        return Codes(codes, scales)
    unpacked = packing.unpack(parts[ZERO_POINTS].cpu().numpy(), bits)
    zero_points = torch.from_numpy(unpacked[: scales.numel()].astype(np.int16)).reshape(
        scales.shape
    )
    codes = torch.empty(values.shape, dtype=torch.int16)
    step = max(1, _CHUNK // max(values.shape[1], 1))
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        rows, groups = scales[part].shape
        if groups:
            points = zero_points[part, :, None]
            grouped = values[part].reshape(rows, groups, -1).to(torch.int16)
            whole = grouped.add_(points).bitwise_and_(2**bits - 1).sub_(points)
            codes[part] = whole.reshape(rows, -1)
    return Codes(codes, scales)


def _codes(bits: int) -> Coding:
    return Coding(
        f"scales{bits}",
        bits,
        (ZERO_POINTS,),
        partial(encode, bits),
        partial(decode, bits),
        partial(check, bits),
    )


SCALES8, SCALES4 = _codes(8), _codes(4)
