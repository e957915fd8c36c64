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
from hf_sparse.formats.format import Encoded, Format, Weight, by_mask, nonzeros_and
from hf_sparse.patterns import Pattern


def encode(weight: Weight, pattern: Pattern) -> Encoded:
    """The nonzeros, and the packed mask of them."""
    return by_mask("bitmask", weight, bits.pack_mask(weight.mask))


def decode(values: Bits, packed: NDArray[np.uint8], rows: int, columns: int) -> Bits:
    """Rebuild the flat weights.

    Raises:
        FormatError: the mask has another length, or another number of bits than there are values.
    """
    count = rows * columns
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


def count(packed: NDArray[np.uint8], rows: int, columns: int) -> int:
    """The number of values."""
    return int(np.bitwise_count(packed).sum(dtype=np.int64))


BITMASK = Format(
    "bitmask",
    "one bit per weight",
    encode,
    decode,
    least=lambda weight: nonzeros_and(weight, -(-weight.mask.size // 8)),
    count=count,
)
