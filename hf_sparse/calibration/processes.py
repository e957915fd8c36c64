"""What the processes of an Accelerator share: batches, sums and means. One process is its own sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from hf_sparse.calibration.recording import Batch


def is_shared(accelerator: Any) -> bool:
    """Whether there are several processes."""
    return accelerator is not None and accelerator.num_processes > 1


def summed(tensor: Tensor, accelerator: Any) -> Tensor:
    """The sum of a tensor over the processes."""
    return accelerator.reduce(tensor, "sum") if is_shared(accelerator) else tensor


def averaged(tensor: Tensor, accelerator: Any) -> Tensor:
    """The mean of a tensor over the processes."""
    return accelerator.reduce(tensor, "mean") if is_shared(accelerator) else tensor


def own_batches(batches: Sequence[Batch], accelerator: Any) -> Sequence[Batch]:
    """This process's share of the calibration data.

    Raises:
        ValueError: there are fewer batches than processes.
    """
    if not is_shared(accelerator):
        return batches
    if len(batches) < accelerator.num_processes:
        raise ValueError(
            f"{len(batches)} batches cannot be shared by {accelerator.num_processes} processes; "
            "give at least one for each."
        )
    return batches[accelerator.process_index :: accelerator.num_processes]


def steps_per_epoch(batches: int, accelerator: Any) -> int:
    """The most batches that any process has: all take so many steps, some see a batch twice."""
    if not is_shared(accelerator):
        return batches
    most: int = max(gather_object([batches]))
    return most
