"""Format `bitmask`: the nonzeros, and one bit per weight that tells where they stand.

values  (nnz,)           nonzeros in row-major order
bitmask (ceil(n / 8),)   bit i % 8 of byte i // 8 is set where weight i is not zero
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_sparse.formats import bits
from hf_sparse.formats.bits import Bits
from hf_sparse.formats.error import FormatError


def encode(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Pack the flat nonzero mask."""
    return bits.pack_mask(mask)


def decode(values: Bits, packed: NDArray[np.uint8], count: int) -> Bits:
    """Rebuild the `count` flat weights.

    Raises:
        FormatError: the mask has another length, or another number of bits than there are values.
    """
    if packed.size != -(-count // 8):
        raise FormatError(
            f"bitmask has {packed.size} bytes, wanted {-(-count // 8)} for {count} weights"
        )
    if count % 8 and packed[-1] >> (count % 8):
        raise FormatError(f"bitmask marks weights behind the last one, index {count - 1}")
    mask = bits.unpack_mask(packed, count)
    marked = int(np.count_nonzero(mask))
    if marked != values.size:
        raise FormatError(f"bitmask marks {marked} nonzeros, but {values.size} values are stored")
    return bits.place(values, mask)
