"""Models cut into shards by FSDP2, on two processes without accelerators."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def sharded(model: nn.Module, blocks: Iterable[nn.Module]) -> Any:
    """Cut the blocks, and then what is left of the model, into two shards each."""
    mesh = init_device_mesh("cpu", (2,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)
