"""Parameters that FSDP2 has cut into shards (DTensor): what can be done with one shard alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_sparse.patterns import Pattern
from hf_sparse.selection import ALONE, Processes


def local_part(tensor: Tensor) -> Tensor:
    """The values of a parameter that this process holds: all of them if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_shardable(name: str, parameter: Tensor, pattern: Pattern) -> None:
    """Refuse patterns whose groups the shards of a parameter may cut.

    FSDP2 gives each process some rows: single weights, N:M groups and groups of one row stay whole.

    Raises:
        ValueError: the parameter is sharded, and not by rows, or the pattern spans rows.
    """
    if not isinstance(parameter, DTensor):
        return
    if any(not (place.is_replicate() or place.is_shard(0)) for place in parameter.placements):
        raise ValueError(
            f"{name} is sharded as {parameter.placements}; wanted shards of rows, as FSDP2 makes them."
        )
    if (
        parameter.ndim < 3 and pattern.least_span(parameter.shape) > 1
    ):  # matrices of stacks are whole
        raise ValueError(
            f"{name} is sharded by rows, and the groups of pattern '{pattern}' span rows. Under FSDP "
            "use unstructured, N:M, row or block:1xC, or train with DDP."
        )


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
