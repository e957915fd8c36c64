"""Parameters that FSDP2 has cut into shards (DTensor): what can be done with one shard alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_sparse.patterns import Pattern
from hf_sparse.selection import ALONE, Processes


def local_part(tensor: Tensor) -> Tensor:
    """The values of a parameter that this process holds: all of them if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_shardable(
    name: str, parameter: Tensor, pattern: Pattern, *, transposed: bool = False
) -> None:
    """Refuse patterns whose groups the shards of a parameter cut.

    FSDP2 gives each process as many rows as the next, and the last one what is left. Of a weight
    that is stored transposed these are columns: of N:M, and of `row`, the groups run across them.

    Args:
        name: for the error.
        parameter: as its module stores it.
        pattern: of its zeros.
        transposed: whether it is stored `(in_features, out_features)`.

    Raises:
        ValueError: the parameter is sharded, and not by rows, or a shard ends inside a group.
    """
    if not isinstance(parameter, DTensor):
        return
    if any(not (place.is_replicate() or place.is_shard(0)) for place in parameter.placements):
        raise ValueError(
            f"{name} is sharded as {parameter.placements}; wanted shards of rows, as FSDP2 makes them."
        )
    if pattern.elementwise or parameter.ndim > 2:  # matrices of stacks are whole
        return
    axis, what = (1, "columns") if transposed else (0, "rows")
    shape = torch.Size(reversed(parameter.shape)) if transposed else parameter.shape
    span, rows = pattern.least_span(shape, axis), rows_of_shard(parameter)
    if rows < len(parameter) and rows % span:
        raise ValueError(
            f"{name} is sharded into {rows} {what} each, and the groups of pattern '{pattern}' span "
            f"{span} {what}. Under FSDP use unstructured, or a pattern whose groups the shards do not "
            "cut, or train with DDP."
        )


def rows_of_shard(parameter: DTensor) -> int:
    """How many rows of a parameter each process holds, but for the last ones."""
    sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    shards = math.prod(size for place, size in sizes if place.is_shard(0))
    return -(-len(parameter) // shards)


class ShardProcesses(Processes):
    """The processes of a DTensor's mesh."""

    def __init__(self, parameter: DTensor) -> None:
        mesh = parameter.device_mesh
        if mesh.ndim != 1:
            raise ValueError(
                f"parameters are sharded over a mesh of {mesh.ndim} dimensions; wanted one "
                "dimension: full sharding without replication."
            )
        self._group = mesh.get_group()
        self._device = mesh.device_type
        self.rank = mesh.get_local_rank()
        self.size = mesh.size()

    def sum_(self, tensor: Tensor) -> None:
        moved = tensor.to(self._device)
        dist.all_reduce(moved, group=self._group)
        tensor.copy_(moved)


def processes_of(parameters: Iterable[Tensor]) -> Processes:
    """The processes that hold the parameters' shards; `ALONE` where they are not sharded."""
    sharded = next((parameter for parameter in parameters if isinstance(parameter, DTensor)), None)
    return ALONE if sharded is None else ShardProcesses(sharded)
