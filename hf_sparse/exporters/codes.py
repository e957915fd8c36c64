"""Weights of few bits inside an ONNX graph: codes and scales, multiplied by `DequantizeLinear`.

    y = MatMul(x, DequantizeLinear(codes, scales, zero_points))      codes (in_features, out_features)
    row = DequantizeLinear(Gather(codes, ids), Gather(scales, ids))  of embeddings

The codes are those of checkpoints, int8 or int4 (uint8 or uint4 with zero points), with blocks of the
group's size, which opset 21 has. ONNX Runtime makes one `MatMulNBits` of the first form, which reads
the codes alone and rounds x to 8 bits inside, unless its session is told not to (`EXACT`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.checkpoint.on_grids import on_grids
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.quantization import Codes, Grid, codes_of

if TYPE_CHECKING:
    import onnx_ir

# The first opset with blocks of scales, and with types of 4 bits.
_OPSET = 21
# What tells a session of ONNX Runtime to multiply in float32: for tests.
EXACT = {"session.disable_quant_qdq": "1"}


@dataclass(frozen=True)
class _Known:
    """A weight of the model, `(out_features, in_features)`, and its grid.

    Attributes:
        turned: the graph has its transpose.
    """

    weight: Tensor
    grid: Grid
    turned: bool = False


def code_(program: onnx_ir.Model, model: PreTrainedModel, config: SparsityConfig) -> Counter[str]:
    """Replace the weights of a graph that a config promises few bits of by their codes, in place.

    Weights of `Gemm`, and embeddings of 4 bits where they are looked up, stay as they are.

    Args:
        program: the graph of the model, in float32.
        model: its weights tell the codes.
        config: with bits.

    Returns:
        How many weights became codes of which type.

    Raises:
        OffGridError: a weight is not on its grid.
    """
    import onnx_ir as ir

    known = dict(_known(model, config))
    done: Counter[str] = Counter()
    found: dict[str, _Known] = {}
    for name, value in program.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or len(tensor.shape) != 2 or tensor.dtype != ir.DataType.FLOAT:
            continue
        if (one := known.get(_key(tensor.numpy()))) is not None:
            found[name] = one
    for name, one in found.items():
        value = program.graph.initializers[name]
        for weight in _weights_of_products(value, one):
            _multiply(ir, program.graph, weight, one)
            done[f"int{one.grid.bits}"] += 1
        if value.uses() and not one.turned and one.grid.bits == 8 and _is_looked_up(value):
            _look_up(ir, program.graph, value, one)
            done[f"int{one.grid.bits}"] += 1
        if not value.uses():
            del program.graph.initializers[name]
    if done:
        program.opset_imports[""] = max(program.opset_imports[""], _OPSET)
    return done


def _weights_of_products(value: Any, one: _Known) -> list[Any]:
    """The values `(in_features, out_features)` that are a known weight, and only that of products.

    The exporter transposes small weights itself, and leaves it to the graph for large ones.
    """
    if one.turned:
        candidates = [value]
    else:
        users = [node for node, _ in value.uses() if node.op_type == "Transpose"]
        candidates = [node.outputs[0] for node in users]
    return [
        weight
        for weight in candidates
        if {(node.op_type, index) for node, index in weight.uses()} == {("MatMul", 1)}
    ]


def _is_looked_up(value: Any) -> bool:
    return {(node.op_type, index) for node, index in value.uses()} == {("Gather", 0)}


def _known(model: PreTrainedModel, config: SparsityConfig) -> Iterator[tuple[bytes, _Known]]:
    """The weights by what they are known by in a graph, where their names are lost: their values."""
    grids = on_grids(model, config).values()
    for on_grid in {id(one.layers[0].parameter): one for one in grids}.values():
        for layer in on_grid.layers:
            weight = layer.weight
            for turned in (False, True):
                array = (weight.T if turned else weight).contiguous().numpy()
                yield _key(array), _Known(weight, on_grid.grid, turned)


def _key(array: NDArray[np.float32]) -> bytes:
    digest = hashlib.blake2b(str(array.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _arrays(one: _Known) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[Any] | None]:
    """Codes `(out_features, in_features)`, scales and zero points `(out_features, groups)`."""
    codes: Codes = codes_of(one.weight, one.grid)
    dtype = _dtype(one.grid)
    scales = codes.scales.numpy()
    if one.grid.symmetric:
        return codes.codes.numpy().astype(dtype), scales, None
    grouped = codes.codes.reshape(*codes.scales.shape, -1)
    points = -grouped.amin(-1, keepdim=True).clamp(max=0)
    whole = (grouped + points).reshape(codes.codes.shape)
    return (
        whole.numpy().astype(np.uint8).astype(dtype),
        scales,
        points[..., 0].numpy().astype(np.uint8).astype(dtype),
    )


def _dtype(grid: Grid) -> Any:
    """The type of codes in a graph."""
    if grid.bits == 8:
        return np.dtype(np.int8 if grid.symmetric else np.uint8)
    import ml_dtypes

    return np.dtype(ml_dtypes.int4 if grid.symmetric else ml_dtypes.uint4)


def _multiply(ir: Any, graph: onnx_ir.Graph, value: Any, one: _Known) -> None:
    """Put `DequantizeLinear` in place of a product's weight `(in_features, out_features)`."""
    codes, scales, points = _arrays(one)
    arrays = [codes.T, scales.T] + ([] if points is None else [points.T])
    per_row = scales.shape[1] == 1
    attributes = {"axis": 1} if per_row else {"axis": 0, "block_size": _size(one)}
    arrays = [arrays[0], *(array[0] if per_row else array for array in arrays[1:])]
    names = ("codes", "scales", "zero_points")
    inputs = [
        _constant(ir, graph, f"{value.name}.{name}", array)
        for name, array in zip(names, arrays, strict=False)
    ]
    node = ir.node("DequantizeLinear", inputs, attributes=attributes)
    _replace(ir, graph, value, [node])


def _look_up(ir: Any, graph: onnx_ir.Graph, value: Any, one: _Known) -> None:
    """Look up codes and scales of embeddings, and multiply what was found.

    The constants are its own: ONNX Runtime makes no `MatMulNBits` of codes that have another use.
    """
    codes, scales, points = _arrays(one)
    arrays = [codes, scales] + ([] if points is None else [points])
    constants = [
        _constant(ir, graph, f"{value.name}.{name}", array)
        for name, array in zip(("codes", "scales", "zero_points"), arrays, strict=False)
    ]
    for user, _ in list(value.uses()):
        made = [ir.node("Gather", [constant, user.inputs[1]]) for constant in constants]
        found = [row.outputs[0] for row in made]
        blocks = {"axis": -1, "block_size": _size(one)}
        made.append(ir.node("DequantizeLinear", found, attributes=blocks))
        last = made[-1].outputs[0]
        last.shape, last.type = user.outputs[0].shape, user.outputs[0].type
        for index, node in enumerate(made):
            node.outputs[0].name = f"{user.outputs[0].name}.{index}"
        ir.convenience.replace_nodes_and_values(
            graph, user, [user], made, list(user.outputs), [last]
        )


def _size(one: _Known) -> int:
    return one.grid.columns_per_scale(one.weight.shape[1])


def _constant(ir: Any, graph: onnx_ir.Graph, name: str, array: NDArray[Any]) -> Any:
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(
        name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.initializers[name] = value
    return value


def _replace(ir: Any, graph: onnx_ir.Graph, value: Any, nodes: list[Any]) -> None:
    """Put the output of nodes in place of an initializer, or of its transpose."""
    made = nodes[-1].outputs[0]
    made.name, made.shape, made.type = f"{value.name}.weight", value.shape, value.type
    ir.convenience.replace_all_uses_with(value, made)
    if (producer := value.producer()) is not None:
        graph.remove(producer, safe=True)
    graph.insert_before(graph[0], nodes)
