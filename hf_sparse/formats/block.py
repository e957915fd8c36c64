"""Format `block`: whole blocks of R x C weights, and one bit per block that tells which are kept.

    values (kept * R * C,)    the blocks in row-major order of blocks, each block row-major
    block  (ceil(blocks / 8),) bit i % 8 of byte i // 8 is set where block i is kept

A block is kept when any of its weights is not zero; zeros inside it are stored as values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_sparse.formats import bits
from hf_sparse.formats.bits import Bits, nonzero_mask
from hf_sparse.formats.error import FormatError
from hf_sparse.formats.format import LARGEST_WEIGHT, Encoded, Format, Weight, by_groups
from hf_sparse.patterns import GroupPattern, Pattern


def encode(weight: Weight, pattern: Pattern) -> Encoded:
    """The blocks that are kept, and the packed mask of them.

    Raises:
        ValueError: the groups of the pattern do not tile the weight.
    """
    rows, columns = weight.matrix_shape
    pattern.check_shape(rows, columns)
    height, width = pattern.group_shape(rows, columns)
    values, packed = kept_blocks(bits.as_bits(weight.oriented), height, width)
    return by_groups("block", weight, values, packed, (height, width))


def kept_blocks(weights: Bits, height: int, width: int) -> tuple[Bits, NDArray[np.uint8]]:
    """Values and packed block mask of `weights` `(rows, columns)`, tiled by height x width."""
    rows, columns = weights.shape
    blocks = weights.reshape(rows // height, height, columns // width, width).transpose(0, 2, 1, 3)
    kept: NDArray[np.bool_] = np.any(nonzero_mask(blocks), axis=(2, 3))
    values = blocks[kept].reshape(-1)
    values[~nonzero_mask(values)] = 0  # -0.0 becomes 0.0, as in every format
    return values, bits.pack_mask(kept)


def decode(
    values: Bits, packed: NDArray[np.uint8], rows: int, columns: int, height: int, width: int
) -> Bits:
    """Rebuild the weights `(rows, columns)`.

    Raises:
        FormatError: the blocks do not tile the shape, or mask and values do not agree.
    """
    if height < 1 or width < 1 or rows % height or columns % width:
        raise FormatError(
            f"blocks of {height} x {width} do not tile a weight of {rows} x {columns}"
        )
    down, across = rows // height, columns // width
    if packed.size != -(-down * across // 8):
        raise FormatError(f"block mask has {packed.size} bytes, wanted {-(-down * across // 8)}")
    if down * across % 8 and packed[-1] >> (down * across % 8):
        raise FormatError(f"block mask marks blocks behind the last one, index {down * across - 1}")
    kept = bits.unpack_mask(packed, down * across)
    marked = int(np.count_nonzero(kept))
    if values.size != marked * height * width:
        raise FormatError(
            f"block mask keeps {marked} blocks of {height} x {width}, but {values.size} values are "
            "stored"
        )
    blocks = np.zeros((down * across, height, width), values.dtype)
    blocks[kept] = values.reshape(marked, height, width)
    tiles = blocks.reshape(down, across, height, width).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiles).reshape(rows, columns)


def count(packed: NDArray[np.uint8], rows: int, columns: int, height: int, width: int) -> int:
    """The number of values."""
    return int(np.bitwise_count(packed).sum(dtype=np.int64)) * height * width


def fits(pattern: Pattern) -> bool:
    """Whether zeros come in blocks."""
    return isinstance(pattern, GroupPattern)


def check(rows: int, columns: int, height: int, width: int) -> bool:
    """Whether a layout may hold blocks of this size."""
    if min(height, width) < 1 or height * width > LARGEST_WEIGHT:
        return False
    return rows % height == 0 and columns % width == 0


BLOCK = Format(
    "block",
    "one bit per block of a block, row, column or head pattern",
    encode,
    decode,
    num_parameters=2,
    check=check,
    structured=True,
    fits=fits,
    stores="block, row, column and head patterns",
    count=count,
)
