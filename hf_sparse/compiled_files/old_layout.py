"""Compiled models of the layout before today's: the same packed weights, and no id.

Their description tells the types of the tensors outside of the blocks, by the names that these have
in the model. All that machine code follows is checked as in any other file, by `restore_stack` and
`fill`. Whether both files come from one save only an id can tell; `check_zeros` compares what both of
them tell beside names, types and sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from hf_sparse.compiled_files.owned_tensors import Entry
from hf_sparse.runtime.kernels.spmm import SIDE_BY_SIDE, UNROLL
from hf_sparse.runtime.kernels.weight_types import type_of
from hf_sparse.runtime.model.state import LAYOUT
from hf_sparse.runtime.weights.dense_weight import DenseWeight
from hf_sparse.runtime.weights.linear import Linear
from hf_sparse.runtime.weights.panels import PackedWeight
from hf_sparse.runtime.weights.stack import Stack


def is_old(layout: Any) -> bool:
    """Whether a description has the layout before today's, with the sizes of today's kernels."""
    sizes = iter(LAYOUT[4:])
    tables = [{str(height): next(sizes) for height in sorted(UNROLL)} for _ in range(3)]
    return bool(layout == [3, *LAYOUT[1:4], *tables])


def types_of(entries: Mapping[str, Entry], described: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Type and shape of each tensor, as today's descriptions tell them, in the order of their use.

    Shapes, and the types in the blocks, are those of the file: `restore_stack` and `fill` compare them
    with what the blocks and the model need.

    Args:
        entries: the tensors of the weights' file.
        described: the old description.
    """
    blocks = [
        f"stack.blocks.{number}.{linear}."
        for number, block in enumerate(described["blocks"])
        for linear in block["linears"]
    ]
    places = {prefix: place for place, prefix in enumerate(blocks)}
    packed = [name for name in entries if name.startswith("stack.")]
    packed.sort(key=lambda name: places.get(".".join(name.split(".")[:4]) + ".", -1))
    types: dict[str, list[Any]] = {
        name: [str(entries[name].dtype), list(entries[name].shape)] for name in packed
    }
    for own, dtype in described["types"].items():
        name = f"buffer.{own}" if f"buffer.{own}" in entries else f"model.{own}"
        if name in entries or own not in described["tied"]:
            types[name] = [dtype, list(entries[name].shape) if name in entries else None]
    return types


def check_zeros(stack: Stack) -> None:
    """Compare the zeros of each weight with their number in the description.

    Raises:
        ValueError: they differ; the message names the weight.
    """
    for linear in stack.linears:
        zeros = linear.rows * linear.columns - _nonzeros(linear)
        if zeros != linear.zeros:
            raise ValueError(
                f"{linear.name} has {zeros} zeros, and its description tells of {linear.zeros}: the "
                "two files were not saved together. Compile the model again."
            )


def _nonzeros(linear: Linear) -> int:
    first = linear.packed[0]
    if isinstance(first, DenseWeight):
        return int(torch.count_nonzero(first.weight))
    return sum(_stored(packed) for packed in linear.packed if isinstance(packed, PackedWeight))


def _stored(packed: PackedWeight) -> int:
    """Weights that are not zero; a row that was packed twice, for want of a second, counts once."""
    nonzero = type_of(packed.values).widen(packed.values) != 0
    height, sides, total = packed.height, SIDE_BY_SIDE[packed.height], 0
    for chunk, following in pairwise(packed.chunks.tolist()):
        panel, group, value, _, row = chunk
        total += int(np.count_nonzero(nonzero[value : following[2]]))
        for _, groups, _ in packed.panels[panel : following[0]].tolist():
            each = packed.groups[group : group + groups].astype(np.int64)
            group += groups
            remainder, pairs, rounds = each[each[:, 1] > 0].T
            if not len(pairs):
                continue
            lengths = (remainder + rounds * UNROLL[height]) * sides * height
            row += int(pairs.sum()) * sides
            value += int((pairs * lengths).sum())
            if sides == 2 and packed.order[row - 1] == packed.order[row - 2]:
                total -= int(np.count_nonzero(nonzero[value - int(lengths[-1]) : value])) // 2
    return total
