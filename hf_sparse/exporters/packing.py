"""Weights packed inside an ONNX graph: nonzeros and their places, rebuilt by standard operators.

The bytes are those of the checkpoint formats `bitmask`, `gap4` and `gap8` (see docs/format.md); all
operators that rebuild a weight have constant inputs, so that ONNX Runtime folds them while it
loads the graph, and runs what it would have run on the dense weight.

    bitmask   bit    = Gather(bits of 0 to 255, bitmask)
              weight = Gather([0, values], bit * CumSum(bit))
    gap4/8    place  = CumSum(code + placing) - 1             placing = code is no skip
              weight = ScatterElements(0, place, Gather([0, values], placing * CumSum(placing)))

A skip stands on a weight that is zero: it writes a zero there. A weight without nonzeros is stored as
its shape alone (`zero`): OpenVINO has no empty arrays of codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_sparse.formats import FORMATS, Weight, format_of, smallest_of
from hf_sparse.patterns import Unstructured

if TYPE_CHECKING:
    import onnx_ir

_LEAST = 1024  # smaller tensors are not worth the operators
_MOST = 2**31  # places are 32-bit integers
# The bits of each byte, least significant first, `(256, 8)`.
_TABLE_NAME = "hf_sparse.bits"
_TABLE = (np.arange(256)[:, None] >> np.arange(8) & 1).astype(np.int32)
_TYPES = ("FLOAT", "FLOAT16", "DOUBLE", "INT8", "UINT8")


@dataclass
class Packing:
    """What was packed.

    Attributes:
        formats: how many weights in which format.
        dense_bytes: of these weights before.
        packed_bytes: of these weights now.
        bound_bytes: of their nonzeros and 1 bit per weight.
        entropy_bytes: of their nonzeros and the entropy of their masks.
    """

    formats: dict[str, int] = field(default_factory=dict)
    dense_bytes: int = 0
    packed_bytes: int = 0
    bound_bytes: float = 0.0
    entropy_bytes: float = 0.0


def pack_(model: onnx_ir.Model) -> Packing:
    """Replace the weights of a graph that are smaller packed, in place.

    Args:
        model: its initializers of 2 axes are looked at, floats and 8-bit integers.

    Memory: one weight and its packed form at a time, beside the graph.
    """
    import onnx_ir as ir

    packing = Packing()
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or len(tensor.shape) != 2 or not _LEAST <= tensor.size < _MOST:
            continue
        if tensor.dtype.name not in _TYPES:
            continue
        weight = tensor.numpy()
        parts = _parts(weight)
        if parts is None:
            continue
        format, coded, nonzeros = parts
        nodes = _Nodes(ir, name, graph.initializers)
        rebuilt = _REBUILD[format](nodes, coded, nonzeros, weight.shape)
        rebuilt.shape, rebuilt.type = value.shape, value.type
        ir.convenience.replace_all_uses_with(value, rebuilt)
        del graph.initializers[name]
        for constant in nodes.constants:
            graph.initializers[constant.name] = constant
        graph.insert_before(graph[0], nodes.nodes)
        _count(packing, format, weight, coded, nonzeros)
    return packing


def _parts(weight: np.ndarray) -> tuple[str, np.ndarray, np.ndarray] | None:
    """The smallest format with its array and the nonzeros; None if that is dense."""
    floats = torch.from_numpy(np.ascontiguousarray(weight))
    # Bytes are compressed as 8-bit floats, whose only other zero is 0x80, which no int8 weight is.
    if floats.dtype in (torch.int8, torch.uint8):
        if bool((floats.view(torch.uint8) == 0x80).any()):
            return None
        floats = floats.view(torch.float8_e5m2)
    parts = _SMALLEST.compress(Weight(floats), Unstructured()).parts()
    if not parts[""].numel():
        return "zero", np.empty(0, np.uint8), np.empty(0, weight.dtype)
    format = format_of(parts)
    if format not in _REBUILD:
        return None
    nonzeros = parts[""]
    if floats.element_size() == 1:
        nonzeros = nonzeros.view(torch.uint8)
    return format, parts[format].numpy(), nonzeros.numpy().view(weight.dtype)


def _count(
    packing: Packing, format: str, weight: np.ndarray, coded: np.ndarray, nonzeros: np.ndarray
) -> None:
    density = nonzeros.size / weight.size
    entropy = sum(-share * math.log2(share) for share in (density, 1 - density) if share)
    packing.formats[format] = packing.formats.get(format, 0) + 1
    packing.dense_bytes += weight.nbytes
    packing.packed_bytes += coded.nbytes + nonzeros.nbytes
    packing.bound_bytes += nonzeros.nbytes + weight.size / 8
    packing.entropy_bytes += nonzeros.nbytes + weight.size * entropy / 8


class _Nodes:
    """Operators and constants that rebuild one weight."""

    def __init__(self, ir: Any, name: str, known: Mapping[str, Any]) -> None:
        self._ir, self._name, self._known = ir, name, known
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, array: np.ndarray) -> Any:
        """A new initializer."""
        return self.shared(f"{self._name}.{name}", array)

    def shared(self, name: str, array: np.ndarray) -> Any:
        """An initializer that all weights may use."""
        if name in self._known:
            return self._known[name]
        tensor = self._ir.tensor(array, name=name)
        value = self._ir.Value(
            name=tensor.name,
            shape=tensor.shape,
            type=self._ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.constants.append(value)
        return value

    def add(self, operator: str, *inputs: Any, **attributes: Any) -> Any:
        """The output of a new operator."""
        node = self._ir.node(operator, list(inputs), attributes=attributes)
        node.outputs[0].name = f"{self._name}.{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def as_int32(self, value: Any) -> Any:
        return self.add("Cast", value, to=self._ir.DataType.INT32)

    def number(self, name: str, value: Any, dtype: Any = np.int64) -> Any:
        return self.constant(name, np.array(value, dtype))

    def zeros(self, name: str, shape: Sequence[int], dtype: Any) -> Any:
        """A tensor of zeros that takes no space."""
        zero = self._ir.tensor(np.zeros(1, dtype))
        return self.add("ConstantOfShape", self.number(name, list(shape)), value=zero)

    def taken(self, marks: Any, nonzeros: np.ndarray) -> Any:
        """The next of the nonzeros where `marks`, int32, is 1, and 0 where it is 0."""
        values = np.empty(nonzeros.size + 1, nonzeros.dtype)
        values[0], values[1:] = 0, nonzeros
        counted = self.add("CumSum", marks, self.number("axis", 0))
        return self.add("Gather", self.constant("values", values), self.add("Mul", counted, marks))


def _from_bitmask(
    nodes: _Nodes, coded: np.ndarray, nonzeros: np.ndarray, shape: Sequence[int]
) -> Any:
    octets = nodes.as_int32(nodes.constant("bitmask", coded))
    marks = nodes.add("Gather", nodes.shared(_TABLE_NAME, _TABLE), octets)
    flat = nodes.add("Reshape", marks, nodes.number("flat", [-1]))
    size = math.prod(shape)
    if size % 8:
        flat = nodes.add("Slice", flat, nodes.number("start", [0]), nodes.number("stop", [size]))
    return nodes.add("Reshape", nodes.taken(flat, nonzeros), nodes.number("shape", list(shape)))


def _from_gaps(
    width: int, nodes: _Nodes, coded: np.ndarray, nonzeros: np.ndarray, shape: Sequence[int]
) -> Any:
    # In 32 bits: OpenVINO's shift of bytes is wrong.
    codes = nodes.as_int32(nodes.constant(f"gap{width}", coded))
    if width == 4:
        low = nodes.add("BitwiseAnd", codes, nodes.number("low", 15, np.int32))
        high = nodes.add("Div", codes, nodes.number("sixteen", 16, np.int32))
        last = nodes.number("last", [1])
        pairs = nodes.add(
            "Concat", nodes.add("Unsqueeze", low, last), nodes.add("Unsqueeze", high, last), axis=1
        )
        codes = nodes.add("Reshape", pairs, nodes.number("flat", [-1]))
        if coded.size and coded[-1] >> 4 == 15:  # fills up the last byte, and may pass the end
            stop = nodes.number("stop", [2 * coded.size - 1])
            codes = nodes.add("Slice", codes, nodes.number("start", [0]), stop)
    skip = nodes.number("skip", 2**width - 1, np.int32)
    placing = nodes.as_int32(nodes.add("Less", codes, skip))
    ends = nodes.add("CumSum", nodes.add("Add", codes, placing), nodes.number("axis0", 0))
    places = nodes.add("Sub", ends, nodes.number("one", 1, np.int32))
    empty = nodes.zeros("size", [math.prod(shape)], nonzeros.dtype)
    flat = nodes.add("ScatterElements", empty, places, nodes.taken(placing, nonzeros), axis=0)
    return nodes.add("Reshape", flat, nodes.number("shape", list(shape)))


def _from_nothing(
    nodes: _Nodes, coded: np.ndarray, nonzeros: np.ndarray, shape: Sequence[int]
) -> Any:
    return nodes.zeros("shape", shape, nonzeros.dtype)


_REBUILD: dict[str, Callable[..., Any]] = {
    "zero": _from_nothing,
    "bitmask": _from_bitmask,
    "gap4": partial(_from_gaps, 4),
    "gap8": partial(_from_gaps, 8),
}
# The smallest of the formats that operators can rebuild.
_SMALLEST = smallest_of([form for name, form in FORMATS.items() if name in ("dense", *_REBUILD)])
