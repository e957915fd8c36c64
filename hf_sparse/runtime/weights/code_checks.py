"""Whether packed codes that were read from a file are safe to run, and mean what they say."""

from __future__ import annotations

import numpy as np

from hf_sparse.runtime.kernels.code_formats import BLOCK, FORMATS, ROWS, UNIT
from hf_sparse.runtime.weights.codes import PADDING, TOGETHER, Array, CodeWeight
from hf_sparse.runtime.weights.damage import require


def _unit_numbers(stream: Array, bits: int) -> Array:
    """Numbers of a few bits from the bytes that units share, `(groups, blocks, units, 16, 4)` uint8."""
    numbers = stream.reshape(*stream.shape[:2], -1, 1, ROWS, UNIT)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None, None]
    apart: Array = numbers >> shifts & np.uint8((1 << bits) - 1)
    return apart.reshape(*stream.shape[:2], -1, ROWS, UNIT)


def _codes_in(packed: CodeWeight, groups: slice) -> tuple[Array, Array]:
    """Codes of some groups, int8, and the columns in their blocks: `(groups, blocks, units, 16, 4)`."""
    form = packed.form
    stored = _unit_numbers(packed.codes[groups], form.bits)
    codes = stored.view(np.int8) if form.bits == 8 else stored.view(np.int8) - np.int8(8)
    number = np.arange(form.units * UNIT).reshape(form.units, 1, UNIT)
    starts = number // form.kept * form.window
    if form.is_dense:
        return codes, np.broadcast_to(number, codes.shape)
    return codes, starts + _unit_numbers(packed.places[groups], form.place_bits)


def check_codes(packed: CodeWeight) -> None:
    """Check that a weight from a file leads kernels nowhere but into its streams and features.

    A place cannot leave its window, since it has no more bits. Of the codes of a window, those that are
    not zero are of different columns, in order; none stands for a row or a column that there is not.

    Raises:
        ValueError: a stream is of another type or shape, or a code or scale is none.
    """
    rows, columns, form = packed.rows, packed.columns, packed.form
    require(form in FORMATS, f"{form} is none of the formats that there are")
    require(rows > 0 and columns > 0, f"{rows} rows, {columns} columns")
    groups, blocks = -(-rows // ROWS), -(-columns // BLOCK)
    masked, blocked = form.is_masked, (groups, blocks)
    wanted = {
        "codes": (np.uint8, packed.codes.shape if masked else (*blocked, form.code_bytes)),
        "places": (np.uint8, (*blocked, form.place_bytes)),
        "scales": (np.uint16, (*blocked, BLOCK // form.group, ROWS)),
        "starts": (np.int64, blocked if masked else (0, 0)),
    }
    for (key, (kind, shape)), stream in zip(wanted.items(), packed.streams, strict=True):
        require(stream.dtype == kind, f"{key} are {stream.dtype}")
        require(stream.shape == shape, f"{key} have the shape {stream.shape}, not {shape}")
        straight = stream.flags.c_contiguous and stream.flags.aligned
        require(straight, f"{key} are {stream.strides}")
    if masked:
        _check_masked_codes(packed)
    step = max(1, TOGETHER // (ROWS * BLOCK * blocks))
    for first in range(0, groups, step):
        part = slice(first, first + step)
        there = np.arange(ROWS) < rows - ROWS * np.arange(groups)[part, None]
        scales = packed.scales[part].astype(np.int64)
        sizes = scales & 0x7FFF if form.bits == 4 else scales  # 8 bits have no signs
        fits = np.where(there[:, None, None], (sizes > 0) & (sizes < 0x7F80), scales == 0)
        require(bool(fits.all()), "some scales are zero, negative in 8 bits, or not finite")
        if masked:
            nonzero, within = _masks_in(packed, part)
        else:
            codes, within = _codes_in(packed, part)
            require(int(codes.min()) > -128, "a code is -128")
            nonzero = codes != 0
        left = columns - BLOCK * (blocks - 1)
        outside = nonzero[:, -1] & (within[:, -1] >= left)
        require(not outside.any(), "some codes stand for no column")
        beyond = nonzero & ~there[:, None, None, :, None]
        require(not beyond.any(), "some codes stand for no row")
        if not form.in_order:
            _check_order(nonzero, within, form.kept)


def _masks_in(packed: CodeWeight, groups: slice) -> tuple[Array, Array]:
    """As `_codes_in`, of a mask: which codes there are."""
    bits = np.unpackbits(packed.places[groups], axis=-1, bitorder="little").astype(bool)
    there = bits.reshape(*bits.shape[:2], packed.form.units, ROWS, UNIT)
    number = np.arange(BLOCK).reshape(packed.form.units, 1, UNIT)
    return there, np.broadcast_to(number, there.shape)


def _check_masked_codes(packed: CodeWeight) -> None:
    """The codes of masks: as many as there are bits, where they are said to begin."""
    require(packed.codes.ndim == 1, f"codes have the shape {packed.codes.shape}")
    counts = np.bitwise_count(packed.places).sum(axis=-1, dtype=np.int64)
    starts = np.cumsum(counts).reshape(counts.shape) - counts
    require(np.array_equal(packed.starts, starts), "starts do not match the masks")
    room = int(counts.sum()) + PADDING
    require(len(packed.codes) == room, f"codes are cut off: {len(packed.codes)} of {room}")
    require(not (packed.codes == 128).any(), "a code is -128")


def _check_order(nonzero: Array, columns: Array, kept: int) -> None:
    """Of a window: its codes in order, wherever its units are."""
    ordered, filled = (one.transpose(0, 1, 3, 2, 4).reshape(-1, kept) for one in (columns, nonzero))
    later = ordered[:, 1:] > ordered[:, :-1]
    require(not (filled[:, 1:] & ~(later & filled[:, :-1])).any(), "codes of a window are mixed up")
