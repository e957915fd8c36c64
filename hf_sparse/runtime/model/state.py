"""A packed stack as named arrays and plain numbers, and back: what files hold.

Whoever restores one from a file gets a checked one: machine code never runs on what was not.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_sparse.runtime.kernels.code_formats import CodeFormat
from hf_sparse.runtime.kernels.shuffled_rows import Window
from hf_sparse.runtime.kernels.spmm import INDEX_BYTES, SIDE_BY_SIDE, UNROLL
from hf_sparse.runtime.kernels.weight_types import WEIGHT_TYPES
from hf_sparse.runtime.model.stack_checks import check_restored
from hf_sparse.runtime.weights.code_part import CodePart
from hf_sparse.runtime.weights.codes import CodeWeight
from hf_sparse.runtime.weights.damage import require
from hf_sparse.runtime.weights.dense_weight import DenseWeight
from hf_sparse.runtime.weights.linear import Linear, TileWeight
from hf_sparse.runtime.weights.panels import CHUNK_ROWS, PANEL_COLUMNS, PackedWeight
from hf_sparse.runtime.weights.rows import DECODE_ROWS, DecodeWeight
from hf_sparse.runtime.weights.shuffled import ShuffledWeight
from hf_sparse.runtime.weights.single_rows import SingleWeight
from hf_sparse.runtime.weights.stack import Block, Cross, Expert, Mixture, Norm, Stack

# Files of another layout are not read: compiling again is quick.
LAYOUT = [7, CHUNK_ROWS, PANEL_COLUMNS, DECODE_ROWS]
LAYOUT += [each[height] for each in (UNROLL, SIDE_BY_SIDE, INDEX_BYTES) for height in sorted(each)]

_NUMBERS = ("rows", "columns", "height", "nonzeros")
_CODE_STREAMS = ("codes", "code_places", "code_scales", "code_starts")
_STREAMS = ("panels", "groups", "values", "indices", "order", "chunks", "chunk_rows")


def stack_state(stack: Stack) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays and numbers of a stack; both together give it back."""
    tensors: dict[str, Tensor] = {}
    unique = list({id(block): block for block in stack.blocks}.values())
    numbers = {
        field.name: getattr(stack, field.name)
        for field in dataclasses.fields(stack)
        if field.name != "blocks" and getattr(stack, field.name) != field.default
    }
    described = [
        _block_state(block, f"blocks.{number}", tensors) for number, block in enumerate(unique)
    ]
    owners: dict[int, int] = {}
    for number, block in enumerate(unique):
        if block.distances is not None:  # blocks may share them
            owner = owners.setdefault(id(block.distances), number)
            described[number]["distances"] = owner
            tensors[f"blocks.{owner}.distances"] = block.distances
    places = {id(block): number for number, block in enumerate(unique)}
    order = [places[id(block)] for block in stack.blocks]
    return tensors, {"stack": numbers, "blocks": described, "order": order}


def restore_stack(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> Stack:
    """Undo `stack_state`, and check everything that a kernel would follow.

    Args:
        tensors: in memory that nobody else writes to: they are checked once.
        description: what `stack_state` gave beside them.

    Raises:
        ValueError: something is missing, does not fit, or is there and not needed; the message
            names it.
    """
    try:
        blocks = [
            _restore_block(block, f"blocks.{number}", tensors)
            for number, block in enumerate(description["blocks"])
        ]
        order = description["order"]
        first_used = list(dict.fromkeys(order))
        right = first_used == list(range(len(blocks)))
        require(right, "stack", f"the order {order[:9]} of its {len(blocks)} blocks")
        stack = Stack(
            blocks=tuple(blocks[number] for number in order),
            **description["stack"],
        )
        check_restored(stack)
        names, again = stack_state(stack)
    except KeyError as error:
        raise ValueError(
            f"a compiled model is damaged: {error.args[0]} is missing. Compile it again."
        ) from error
    except (TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"a compiled model is damaged: {error!r}. Compile it again.") from error
    extra = sorted(names.keys() ^ tensors.keys())
    require(not extra, "stack", f"the tensors {extra[:3]}, which it does not need")
    require(all(description[k] == again[k] for k in again), "stack", "its description")
    return stack


def _block_state(block: Block, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    described: dict[str, Any] = {"window": block.window, "linears": {}, "epsilons": {}}
    for name, linear in block.named_linears.items():
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
            if isinstance(packed, CodePart):
                continue
            for stream in _STREAMS:
                tensors[f"{place}.{number}.{stream}"] = torch.from_numpy(getattr(packed, stream))
        if linear.bias is not None:
            tensors[f"{place}.bias"] = linear.bias
        if linear.codes is not None:
            described["linears"][name]["format"] = list(dataclasses.astuple(linear.codes.form))
            described["linears"][name]["rows"] = linear.codes.rows
            for stream, array in zip(_CODE_STREAMS, linear.codes.streams, strict=True):
                tensors[f"{place}.{stream}"] = torch.from_numpy(array)
        elif isinstance(linear.single, DecodeWeight):
            tensors[f"{place}.words"] = torch.from_numpy(linear.single.words)
            tensors[f"{place}.single_values"] = torch.from_numpy(linear.single.values)
            tensors[f"{place}.starts"] = torch.from_numpy(linear.single.starts)
        elif isinstance(linear.single, ShuffledWeight):
            tensors[f"{place}.places"] = torch.from_numpy(linear.single.words)
            tensors[f"{place}.single_values"] = torch.from_numpy(linear.single.values)
            window = linear.single.window
            described["linears"][name]["window"] = [window.columns, window.kept]
        elif isinstance(linear.single, Tensor) and not linear.shares:
            tensors[f"{place}.single"] = linear.single
        described["linears"][name]["shared"] = linear.shares
    if block.mixture is not None:
        described["experts"] = len(block.mixture.experts)
        described["chosen"] = block.mixture.chosen
        described["normalised"] = block.mixture.normalised
    if block.rotation != 0:
        described["rotation"] = block.rotation
    for name, some in _norms_of(block).items():
        described["epsilons"][name] = [norm and norm.epsilon for norm in some]
        for number, norm in enumerate(some):
            if norm is None:
                continue
            tensors[f"{prefix}.{name}.{number}.weight"] = norm.weight
            tensors[f"{prefix}.{name}.{number}.bias"] = norm.bias
    return described


def _norms_of(block: Block) -> dict[str, tuple[Norm | None, ...]]:
    """The norms of a block by their kinds."""
    norms: dict[str, tuple[Norm | None, ...]] = {
        "norms": block.norms,
        "head_norms": block.head_norms or (),
    }
    if block.added_norms is not None:
        norms["added_norms"] = block.added_norms
    if block.cross is not None:
        norms["cross_norm"] = (block.cross.norm,)
    return norms


def _numbers(packed: TileWeight) -> dict[str, int]:
    if isinstance(packed, DenseWeight | CodePart):
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
            None
            if epsilon is None
            else Norm(
                tensors[f"{prefix}.{name}.{number}.weight"],
                tensors[f"{prefix}.{name}.{number}.bias"],
                float(epsilon),
            )
            for number, epsilon in enumerate(epsilons)
        )
        for name, epsilons in described["epsilons"].items()
    }
    owner = described.get("distances")
    mixture = _restore_mixture(described, linears) if "experts" in described else None
    if mixture is not None:
        linears |= vars(mixture.experts[0])
    cross = _restore_cross(norms["cross_norm"], linears, prefix) if "cross_norm" in norms else None
    attention, perceptron = norms["norms"]
    return Block(
        **{"gate": None} | linears,
        norms=(attention, perceptron),
        head_norms=_pair(norms["head_norms"], prefix),
        window=int(described["window"]),
        added_norms=_pair(norms.get("added_norms", ()), prefix),
        rotation=described.get("rotation", 0),
        mixture=mixture,
        cross=cross,
        distances=tensors[f"blocks.{owner}.distances"] if owner is not None else None,
    )


def _restore_cross(norms: tuple[Norm | None, ...], linears: dict[str, Linear], place: str) -> Cross:
    """Attention to an encoder's states, whose weights are taken out of a block's."""
    query, keys, out = (linears.pop(f"cross.{name}") for name in ("query", "keys", "out"))
    norm = norms[0] if norms else None
    require(norm is not None, place, "the norm of its cross-attention is missing")
    assert norm is not None
    return Cross(query, keys, out, norm)


def _restore_mixture(described: Mapping[str, Any], linears: dict[str, Linear]) -> Mixture:
    """The experts among a block's weights, which are taken out of them."""
    experts = tuple(
        Expert(*(linears.pop(f"experts.{number}.{name}") for name in ("gate", "up", "down")))
        for number in range(min(described["experts"], len(linears)))
    )
    router = linears.pop("router")
    return Mixture(router, experts, described["chosen"], described["normalised"])


def _pair(norms: tuple[Norm | None, ...], place: str) -> tuple[Norm, Norm] | None:
    """Two norms, or none of them."""
    present = [norm for norm in norms if norm is not None]
    require(len(present) == len(norms) and len(norms) in (0, 2), place, "a norm is missing")
    return (present[0], present[1]) if present else None


def _restore_linear(
    described: Mapping[str, Any], place: str, tensors: Mapping[str, Tensor]
) -> Linear:
    by_name = {str(dtype): weight_type for dtype, weight_type in WEIGHT_TYPES.items()}
    weight_type = by_name[described["dtype"]]
    dense, streams = tensors.get(f"{place}.dense"), itertools.count()
    edges = tuple(described["edges"])
    codes = _restore_codes(described, edges, place, tensors) if "format" in described else None

    def part(numbers: Mapping[str, Any]) -> TileWeight:
        if codes is not None:
            return CodePart(codes, **numbers)
        if dense is not None:
            return DenseWeight(dense, **numbers)
        prefix = f"{place}.{next(streams)}"
        found: Any = {name: tensors[f"{prefix}.{name}"].numpy() for name in _STREAMS}
        return PackedWeight(**numbers, **found)

    parts = tuple(tuple(part(numbers) for numbers in summands) for summands in described["parts"])
    single: SingleWeight | None = tensors.get(f"{place}.single")
    if described["shared"]:
        single = dense if codes is None else codes
    if f"{place}.words" in tensors:
        names = ("words", "single_values", "starts")
        words, values, starts = (tensors[f"{place}.{name}"].numpy() for name in names)
        single = DecodeWeight(parts[0][0].rows, edges[-1], words, values, starts)
    elif "window" in described:
        words, values = (tensors[f"{place}.{name}"].numpy() for name in ("places", "single_values"))
        sizes = described["window"]
        pair = isinstance(sizes, list) and len(sizes) == 2
        require(pair, place, f"its window is {sizes!r}, not two numbers")
        single = ShuffledWeight(parts[0][0].rows, edges[-1], Window(*sizes), values, words)
    return Linear(
        described["name"],
        described["pattern"],
        parts,
        edges,
        tensors.get(f"{place}.bias"),
        described["zeros"],
        weight_type.dtype,
        single,
    )


def _restore_codes(
    described: Mapping[str, Any], edges: tuple[int, ...], place: str, tensors: Mapping[str, Tensor]
) -> CodeWeight:
    numbers, rows = described["format"], described["rows"]
    fits = isinstance(numbers, list) and len(numbers) == 4
    fits = fits and all(type(number) is int for number in (*numbers, rows))
    require(fits, place, f"its format is {numbers!r}, with {rows!r} rows")
    streams = (tensors[f"{place}.{stream}"].numpy() for stream in _CODE_STREAMS)
    return CodeWeight(rows, edges[-1], CodeFormat(*numbers), *streams)
