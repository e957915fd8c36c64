"""The loop of the training programs: each process takes its share of the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.support.sharding import sharded


def prepared(
    accelerator: Accelerator, kind: str, model: Any, optimizer_of: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """A model, on shards for `fsdp2`, and an optimizer of it that is made once it is."""
    if kind == "fsdp2":  # Accelerate has FSDP for accelerators only
        sharded(model, model.model.layers)
        return model, optimizer_of(model)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    return model, optimizer


def shares(accelerator: Accelerator, steps: int) -> Iterator[Tensor]:
    """Token ids `(4 / processes, 12)` for each step."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(2, 256, (4, 12), generator=generator)
        yield ids[accelerator.process_index :: accelerator.num_processes]


def train(accelerator: Accelerator, model: Any, optimizer: Any, steps: int) -> Iterator[int]:
    """Train on `shares`; comes back after each step of the optimizer, with its number."""
    model.train()
    for number, ids in enumerate(shares(accelerator, steps)):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield number


def save_whole(accelerator: Accelerator, model: Any, file: str) -> None:
    """Write the whole model's tensors, put together from shards where it has them."""
    state = accelerator.unwrap_model(model).state_dict()
    state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}
    if accelerator.is_main_process:
        save_file({k: v.contiguous() for k, v in state.items()}, file)
