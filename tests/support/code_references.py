"""What the kernels for codes of few bits compute, in plain numpy, and what packed codes stand for."""

from __future__ import annotations

import numpy as np

from hf_sparse.runtime.weights.codes import CodeWeight

# Of a record of 64 features: 64 codes, 64 bytes beside them, a scale, two sums.
Codes = tuple[np.ndarray, np.ndarray]


def quantise_ref(x: np.ndarray) -> Codes:
    """Features `(n,)` in eight bits, and their scales, one for 64: as the kernel rounds them."""
    padded = np.zeros(-(-len(x) // 64) * 64, np.float32)
    padded[: len(x)] = x
    blocks = padded.reshape(-1, 64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    codes = np.clip(np.rint(blocks * inverse), -127, 127).astype(np.int64)
    return codes, (largest / np.float32(127))[:, 0]


def product_ref(codes: np.ndarray, scales: np.ndarray, group: int, x: np.ndarray) -> np.ndarray:
    """`W x`, `(rows,)` float64, with exact integer sums over the columns of a scale.

    Args:
        codes: `(rows, columns)` integers.
        scales: `(rows, ceil(columns / group))`.
        group: columns of a scale: 32, or any multiple of 64, or all.
        x: `(columns,)`.
    """
    rows, columns = codes.shape
    features, of_blocks = quantise_ref(x)
    padded = np.zeros((rows, features.size), np.int64)
    padded[:, :columns] = codes
    products = padded * features.reshape(-1)
    small = min(group, 64)
    sums = products.reshape(rows, -1, small).sum(axis=2)
    begins = np.arange(sums.shape[1]) * small
    own = scales[:, np.minimum(begins // group, scales.shape[1] - 1)].astype(np.float64)
    return np.asarray((sums * own * of_blocks.astype(np.float64)[begins // 64]).sum(axis=1))


def dequantised(codes: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """`codes * scales`, `(rows, columns)` float32."""
    own = np.repeat(scales, group, axis=1)[:, : codes.shape[1]]
    return np.asarray(codes * own, np.float32)


def unpack_codes(packed: CodeWeight) -> tuple[np.ndarray, np.ndarray]:
    """Codes `(rows, columns)` int8, and the scale of each, float32; read byte by byte."""
    form = packed.form
    rows, columns = packed.rows, packed.columns
    if form.is_masked:
        return _unpack_masked(packed)
    found = np.zeros((rows + 16, packed.blocks * 64), np.int8)
    scales = np.zeros(found.shape, np.float32)
    for group, block in np.ndindex(*packed.codes.shape[:2]):
        bits = np.unpackbits(packed.codes[group, block], bitorder="little")
        places = np.unpackbits(packed.places[group, block], bitorder="little")
        stored = packed.scales[group, block].astype(np.uint32) << 16
        own = np.repeat(stored.view(np.float32).T, form.group, axis=1)
        scales[group * 16 : group * 16 + 16, block * 64 : block * 64 + 64] = own
        for unit, row, code in np.ndindex(form.units, 16, 4):
            number = _number(bits, form.bits, unit, row, code)
            value = number - 8 if form.bits == 4 else (number + 128) % 256 - 128
            kept = 4 * unit + code
            column = kept // form.kept * form.window
            if form.kept == form.window:
                column = kept
            else:
                column += _number(places, form.place_bits, unit, row, code)
            if value:
                assert not found[group * 16 + row, block * 64 + column]
                found[group * 16 + row, block * 64 + column] = value
    return found[:rows, :columns], scales[:rows, :columns]


def _unpack_masked(packed: CodeWeight) -> tuple[np.ndarray, np.ndarray]:
    """The same of codes of a mask."""
    found = np.zeros((packed.rows + 16, packed.blocks * 64), np.int8)
    scales, taken = np.zeros(found.shape, np.float32), 0
    for group, block in np.ndindex(*packed.scales.shape[:2]):
        assert packed.starts[group, block] == taken
        bits = np.unpackbits(packed.places[group, block], bitorder="little")
        stored = packed.scales[group, block].astype(np.uint32) << 16
        own = np.repeat(stored.view(np.float32).T, packed.form.group, axis=1)
        scales[group * 16 : group * 16 + 16, block * 64 : block * 64 + 64] = own
        for unit, row, code in np.ndindex(16, 16, 4):
            if bits[unit * 64 + row * 4 + code]:
                value = packed.codes[taken].view(np.int8)
                found[group * 16 + row, block * 64 + unit * 4 + code] = value
                taken += 1
    assert not packed.codes[taken:].any()
    return found[: packed.rows, : packed.columns], scales[: packed.rows, : packed.columns]


def _number(bits: np.ndarray, size: int, unit: int, row: int, code: int) -> int:
    each = 8 // size
    byte = (unit // each) * 64 + row * 4 + code
    start = byte * 8 + unit % each * size
    return sum(int(bit) << place for place, bit in enumerate(bits[start : start + size]))
