"""A packed stack as named arrays and plain numbers, and back: what files hold.

Whoever restores one from a file gets a checked one: machine code never runs on what was not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_sparse.runtime.blocks import Block, Norm, Stack, check_stack, require, require_floats
from hf_sparse.runtime.decode import COLUMNS, GROUP
from hf_sparse.runtime.decode_packing import DECODE_ROWS, DecodeWeight, check_decode
from hf_sparse.runtime.dense import DenseWeight
from hf_sparse.runtime.linear import Linear, check_finite
from hf_sparse.runtime.packing import CHUNK_ROWS, PANEL_COLUMNS, PackedWeight, check
from hf_sparse.runtime.spmm import INDEX_BYTES, SIDE_BY_SIDE, UNROLL
from hf_sparse.runtime.weight_types import WEIGHT_TYPES

# Files of another layout are not read: compiling again is quick.
LAYOUT = [3, CHUNK_ROWS, PANEL_COLUMNS, DECODE_ROWS, UNROLL, SIDE_BY_SIDE, INDEX_BYTES]

_LINEARS = ("qkv", "out", "up", "down", "gate")
_NUMBERS = ("rows", "columns", "height", "nonzeros")
_STREAMS = ("panels", "groups", "values", "indices", "order", "chunks", "chunk_rows")


def stack_state(stack: Stack) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays and numbers of a stack; both together give it back."""
    tensors: dict[str, Tensor] = {}
    unique = list({id(block): block for block in stack.blocks}.values())
    numbers = {
        field.name: getattr(stack, field.name)
        for field in dataclasses.fields(stack)
        if field.name != "blocks"
    }
    described = [
        _block_state(block, f"blocks.{number}", tensors) for number, block in enumerate(unique)
    ]
    places = {id(block): number for number, block in enumerate(unique)}
    order = [places[id(block)] for block in stack.blocks]
    return tensors, {"stack": numbers, "blocks": described, "order": order}


def restore_stack(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> Stack:
    """Undo `stack_state`, and check everything that a kernel would follow.

    Raises:
        ValueError: something is missing, or does not fit; the message names it.
    """
    try:
        blocks = [
            _restore_block(block, f"blocks.{number}", tensors)
            for number, block in enumerate(description["blocks"])
        ]
        order = description["order"]
        first_used = list(dict.fromkeys(order))
        require(first_used == list(range(len(blocks))), "stack", f"its order {order}")
        stack = Stack(
            blocks=tuple(blocks[number] for number in order),
            **description["stack"],
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"a compiled model is damaged: {error!r}. Compile it again.") from error
    check_stack(stack)
    return stack


def _block_state(block: Block, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    described: dict[str, Any] = {"window": block.window, "linears": {}, "epsilons": {}}
    for name in _LINEARS:
        linear: Linear | None = getattr(block, name)
        if linear is None:
            continue
        place = f"{prefix}.{name}"
        described["linears"][name] = {
            "name": linear.name,
            "pattern": linear.pattern,
            "edges": list(linear.edges),
            "zeros": linear.zeros,
            "dtype": str(linear.dtype),
            "parts": [[_numbers(packed) for packed in part] for part in linear.parts],
        }
        for number, packed in enumerate(linear.packed):
            if isinstance(packed, DenseWeight):
                tensors[f"{place}.dense"] = packed.weight
                continue
            for stream in _STREAMS:
                tensors[f"{place}.{number}.{stream}"] = torch.from_numpy(getattr(packed, stream))
        if linear.bias is not None:
            tensors[f"{place}.bias"] = linear.bias
        if isinstance(linear.single, DecodeWeight):
            tensors[f"{place}.words"] = torch.from_numpy(linear.single.words)
            tensors[f"{place}.single_values"] = torch.from_numpy(linear.single.values)
            tensors[f"{place}.starts"] = torch.from_numpy(linear.single.starts)
        elif linear.single is not None and not linear.shares:
            tensors[f"{place}.single"] = linear.single
        described["linears"][name]["shared"] = linear.shares
    for name, norms in (("norms", block.norms), ("head_norms", block.head_norms or ())):
        described["epsilons"][name] = [norm.epsilon for norm in norms]
        for number, norm in enumerate(norms):
            tensors[f"{prefix}.{name}.{number}.weight"] = norm.weight
            tensors[f"{prefix}.{name}.{number}.bias"] = norm.bias
    return described


def _numbers(packed: PackedWeight | DenseWeight) -> dict[str, int]:
    if isinstance(packed, DenseWeight):
        return {"first_column": packed.first_column, "columns": packed.columns}
    return {name: getattr(packed, name) for name in _NUMBERS}


def _restore_block(
    described: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor]
) -> Block:
    linears: dict[str, Any] = {
        name: _restore_linear(linear, f"{prefix}.{name}", tensors)
        for name, linear in described["linears"].items()
    }
    norms = {
        name: tuple(
            Norm(
                tensors[f"{prefix}.{name}.{number}.weight"],
                tensors[f"{prefix}.{name}.{number}.bias"],
                float(epsilon),
            )
            for number, epsilon in enumerate(epsilons)
        )
        for name, epsilons in described["epsilons"].items()
    }
    attention, perceptron = norms["norms"]
    heads = norms["head_norms"]
    return Block(
        **{"gate": None} | linears,
        norms=(attention, perceptron),
        head_norms=(heads[0], heads[1]) if heads else None,
        window=int(described["window"]),
    )


def _restore_linear(
    described: Mapping[str, Any], place: str, tensors: Mapping[str, Tensor]
) -> Linear:
    parts, number = [], 0
    kept = {str(dtype): kept for dtype, kept in WEIGHT_TYPES.items()}[described["dtype"]]
    dense = tensors.get(f"{place}.dense")
    if dense is not None:
        _require_matrix(dense, kept.dtype, f"{place}.dense")
        require(DenseWeight.suits(dense), place, f"its dense weight has {len(dense)} rows")
    for part in described["parts"]:
        summands: list[PackedWeight | DenseWeight] = []
        for numbers in part:
            if dense is not None:
                columns = int(numbers["columns"])
                summands.append(DenseWeight(dense, int(numbers["first_column"]), columns))
                continue
            streams: Any = {n: tensors[f"{place}.{number}.{n}"].numpy() for n in _STREAMS}
            restored = PackedWeight(**numbers, **streams)
            check(restored, kept)
            summands.append(restored)
            number += 1
        parts.append(tuple(summands))
    first = parts[0][0]
    rows, edges = first.rows, tuple(described["edges"])
    single: DecodeWeight | Tensor | None = tensors.get(f"{place}.single")
    if described["shared"]:
        single = dense
    if f"{place}.words" in tensors:
        single = DecodeWeight(
            rows,
            edges[-1],
            tensors[f"{place}.words"].numpy(),
            tensors[f"{place}.single_values"].numpy(),
            tensors[f"{place}.starts"].numpy(),
        )
        check_decode(single, kept)
    linear = Linear(
        described["name"],
        described["pattern"],
        tuple(parts),
        edges,
        tensors.get(f"{place}.bias"),
        int(described["zeros"]),
        kept.dtype,
        single,
    )
    widths = [part[0].columns for part in parts]
    require(list(np.cumsum([0, *widths])) == list(edges), place, "its parts and edges differ")
    for part in parts:
        for packed in part:
            if isinstance(packed, DenseWeight):
                begins = packed.first_column == edges[parts.index(part)]
                fits = begins and packed.weight.shape[1] == edges[-1]
                require(fits and packed.columns > 0, place, "its dense columns")
            same = packed.rows == rows and packed.columns == part[0].columns
            same = same and np.array_equal(packed.chunk_rows, first.chunk_rows)
            require(same, place, "its parts have different rows, columns or chunks")
    if linear.bias is not None:
        require_floats(linear.bias, place, rows)
    if isinstance(single, Tensor):
        _require_matrix(single, kept.dtype, place)
        whole = tuple(
            -(-size // unit) * unit for size, unit in ((rows, GROUP), (edges[-1], COLUMNS))
        )
        require(tuple(single.shape) == whole, place, f"its single weight is not {whole}")
    return linear


def _require_matrix(tensor: Tensor, dtype: torch.dtype, place: str) -> None:
    fits = tensor.dtype == dtype and tensor.is_contiguous() and tensor.ndim == 2
    require(fits, place, f"its weight is {tensor.dtype} {tuple(tensor.shape)}")
    check_finite(tensor, f"the blocks cannot be run: {place}")
