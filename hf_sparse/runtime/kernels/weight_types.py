"""The types in which weights lie in memory. Kernels compute in float32, whatever they are.

bfloat16 is the upper half of a float32, and float16 has fewer bits everywhere: kernels widen both as
they load them, without loss, so that memory has half as much to bring.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, lanes_of, vector


@dataclass(frozen=True)
class WeightType:
    """A type of weights.

    Attributes:
        dtype: torch's.
        array: numpy's; of bfloat16, which numpy lacks, the bits.
        suffix: of the kernels that read it.
    """

    dtype: torch.dtype
    array: np.dtype
    suffix: str = ""

    @property
    def size(self) -> int:
        """Bytes of a weight."""
        return self.dtype.itemsize

    @property
    def lane(self) -> str:
        """The integer of a weight's size."""
        return f"i{8 * self.size}"

    def narrow(self, values: NDArray) -> NDArray:
        """Float32 values that came from this type, as they are stored."""
        if self is BFLOAT16:
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(self.array, copy=False)

    def widen(self, values: NDArray) -> NDArray:
        """Undo `narrow`."""
        if self is BFLOAT16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32, copy=False)

    def load(self, f: Function, target: Target, at: Value, lanes: int = 0) -> Value:
        """The weights that begin at `at`, as floats: a vector, or one of them if `lanes` is 0."""
        kind = vector(lanes, self.lane) if lanes else self.lane
        return self.floats(f, target, at.load(kind, self.size))

    def floats(self, f: Function, target: Target, bits: Value) -> Value:
        """Floats from the bits of stored weights."""
        lanes = lanes_of(bits.kind)

        def kind(element: str) -> str:
            return vector(lanes, element) if lanes else element

        if self is FLOAT32:
            return bits.cast("bitcast", kind("float"))
        if self is FLOAT16 and target.has.half:
            return bits.cast("bitcast", kind("half")).cast("fpext", kind("float"))
        bits = bits.cast("zext", kind("i32"))
        if self is BFLOAT16:
            return (bits << 16).cast("bitcast", kind("float"))
        # Exponent and fraction at their places; 2^112 is how far the exponents' zeros are apart.
        size = ((bits & 0x7FFF) << 13).cast("bitcast", kind("float")) * 2.0**112
        sign = (bits & 0x8000) << 16
        return (size.cast("bitcast", kind("i32")) | sign).cast("bitcast", kind("float"))


FLOAT32 = WeightType(torch.float32, np.dtype(np.float32))
BFLOAT16 = WeightType(torch.bfloat16, np.dtype(np.uint16), "_bf16")
FLOAT16 = WeightType(torch.float16, np.dtype(np.float16), "_f16")

WEIGHT_TYPES = {weight_type.dtype: weight_type for weight_type in (FLOAT32, BFLOAT16, FLOAT16)}


def type_of(values: NDArray) -> WeightType:
    """The type of stored values.

    Raises:
        ValueError: there is none that numpy holds in this type.
    """
    for weight_type in WEIGHT_TYPES.values():
        if weight_type.array == values.dtype:
            return weight_type
    known = ", ".join(str(weight_type.array) for weight_type in WEIGHT_TYPES.values())
    raise ValueError(f"values are {values.dtype}; wanted one of {known}.")
