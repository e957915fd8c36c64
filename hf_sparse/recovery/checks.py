"""What a recovery is given: settings, batches and a model, checked before anything changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_sparse.adapters.loading import import_peft
from hf_sparse.adapters.on_layers import adaptable
from hf_sparse.calibration.losses import check_labels, check_predicts, with_labels
from hf_sparse.optim.zeros import is_sparse
from hf_sparse.provenance.record import provenance_of
from hf_sparse.recovery.methods import RECOVERIES
from hf_sparse.recovery.rates import SEARCH
from hf_sparse.structure.layers import TargetLayer, num_parameters, promised_config

# Steps of a model's history that leave it without zeros, and with less to know.
_SMALLER = ("shrink", "drop_blocks", "drop_experts", "drop_hidden", "slim")


def check_settings(method: str, epochs: int, accumulate: int, r: int | None, seed: int) -> None:
    if RECOVERIES[method].r is not None:
        import_peft()
    for name, value in (("epochs", epochs), ("accumulate", accumulate), ("r", r)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is {value!r}; wanted a whole number >= 1.")
    if r is not None and RECOVERIES[method].r is None:
        raise ValueError(f"method '{method}' trains all weights; r is for 'lora' and 'shira'.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; wanted a whole number from 0 on, below 2**63.")


def check_rate(lr: float | str | None, held_out: int) -> None:
    if isinstance(lr, str) and lr != SEARCH:
        meant = f" Did you mean {number:g}?" if (number := _number(lr)) is not None else ""
        raise ValueError(f"recover_: lr is {lr!r}; wanted a number > 0, or '{SEARCH}'.{meant}")
    if isinstance(lr, float | int) and not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr!r}; wanted a number > 0.")
    if held_out < 0:
        raise ValueError(f"held_out is {held_out!r}; wanted a number of batches >= 0.")
    if lr == SEARCH and not held_out:
        raise ValueError(
            f"lr is '{SEARCH}', which compares losses on held-out batches, and held_out is 0. Hold "
            "some of the last batches out."
        )


def _number(text: str) -> float | None:
    """The number in a text, if it is one."""
    try:
        return float(text)
    except ValueError:
        return None


def split_held_out(
    batches: list[dict[str, Any]], held_out: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The batches to train on, and those at the end that are held out."""
    if held_out >= len(batches):
        raise ValueError(
            f"held_out is {held_out} of {len(batches)} batches; none are left to train on. Hold fewer "
            "out, or give more text."
        )
    kept = len(batches) - held_out
    return batches[:kept], batches[kept:]


def labelled(
    batches: Sequence[dict[str, Any]], model: nn.Module, method: str
) -> list[dict[str, Any]]:
    """The batches with labels, each of which has a token to predict."""
    check_labels(method, None, model, batches)
    found = [with_labels(batch) for batch in batches]
    for batch in found:
        check_predicts(batch)
    return found


def check_recoverable(
    model: nn.Module, layers: Sequence[TargetLayer], method: str, teacher: nn.Module | None
) -> None:
    """Raise a ValueError unless there is something to recover, and a type that can be trained."""
    promised = promised_config(model)
    quantised = promised is not None and promised.bits is not None
    if not quantised and not any(is_sparse(layer.parameter.detach()) for layer in layers):
        if not _is_smaller(model, teacher):
            raise ValueError(
                f"{type(model).__name__} has no zeros to keep, and is not known to have been made "
                "smaller. Prune it first: hf_sparse.prune_. Of a smaller model give the whole one as "
                "teacher."
            )
        if RECOVERIES[method].r is not None:
            raise ValueError(
                f"{type(model).__name__} has no zeros, which method '{method}' is for: what was made "
                "smaller needs all its weights to recover. Take method='finetune'."
            )
    if RECOVERIES[method].r is not None and not adaptable(layers):
        raise ValueError(
            f"the sparse weights of {type(model).__name__} are experts in 3-D parameters, which no "
            "adapter that keeps zeros reaches. Take method='finetune'."
        )
    if method == "finetune" and any(p.dtype != torch.float32 for p in model.parameters()):
        raise ValueError(
            "fine-tuning all weights of a model in half precision loses small updates. Load it with "
            "dtype=torch.float32, or recover by 'lora', whose base model may be bfloat16."
        )


def _is_smaller(model: nn.Module, teacher: nn.Module | None) -> bool:
    """Whether blocks or parts of them were removed, as its provenance or its teacher's size tells."""
    if any(step.method in _SMALLER for step in provenance_of(model).steps):
        return True
    return teacher is not None and num_parameters(model) < num_parameters(teacher)
