"""DeepSpeed ZeRO is refused: it flattens parameters, and rows and columns are lost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from hf_sparse.upstream.transformers.training import is_deepspeed_zero3_enabled

if TYPE_CHECKING:
    from transformers import TrainingArguments

# What cannot be done with flattened parameters.
SHRINKING = "their matrices cannot be shrunk"
KEEPING = "their zeros cannot be kept"
_INSTEAD = "Train with DDP or FSDP2 instead."


def check_training(lost: str, args: TrainingArguments | None = None) -> None:
    """Refuse a training under DeepSpeed.

    Args:
        lost: what cannot be done under it: `SHRINKING` or `KEEPING`.
        args: the Trainer's; None where they are not known yet.

    Raises:
        ValueError: what runs it, and what to take instead.
    """
    if getattr(args, "deepspeed", None) or is_deepspeed_zero3_enabled():
        raise ValueError(f"DeepSpeed ZeRO flattens parameters: {lost}. {_INSTEAD}")


def check_whole_parameters(lost: str, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters that DeepSpeed has flattened.

    Args:
        lost: what cannot be done with them: `SHRINKING` or `KEEPING`.
        parameters: under their names.

    Raises:
        ValueError: the first such parameter.
    """
    for name, parameter in parameters:
        if hasattr(parameter, "ds_id") or hasattr(parameter, "ds_tensor"):
            raise ValueError(
                f"{name} is partitioned by DeepSpeed ZeRO, which flattens parameters: {lost}. "
                f"{_INSTEAD}"
            )
