"""Weights of few bits: the grid that they lie on, and the codes that say where.

A quantised model is a plain model: its weights hold `scale * code`, in any dtype, and a pruned weight
is code 0. Codes and scales are found again from the weights alone (`codes_of`), as zeros are the mask:
no stage keeps a second copy. A scale is a bfloat16, so that the product of scale and code is exact in
float32, and known again in bfloat16 and float16.
"""

from hf_sparse.quantization.codes import Codes, OffGridError, codes_of, lies_on, lowest_steps
from hf_sparse.quantization.grid import BITS, GROUP_SIZES, SMALLEST_SCALE, Grid
from hf_sparse.quantization.rounding import (
    fitted_scales,
    lowest_codes,
    nearest_codes,
    rounded,
)

__all__ = [
    "BITS",
    "GROUP_SIZES",
    "SMALLEST_SCALE",
    "Codes",
    "Grid",
    "OffGridError",
    "codes_of",
    "fitted_scales",
    "lies_on",
    "lowest_codes",
    "lowest_steps",
    "nearest_codes",
    "rounded",
]
