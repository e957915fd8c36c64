"""Attention written in plain products, where that trains faster than torch's fused function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_sparse.calibration.losses import is_bfloat16_faster
from hf_sparse.calibration.modes import switched
from hf_sparse.upstream.transformers.models import ATTENTION_SETTING, attention_of

# Tokens of a sequence up to which its scores are small beside the rest of a model's activations.
_SHORT = 1024


@contextmanager
def fast_attention(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """For a while a model computes attention by whole matrices of scores, where that is faster.

    torch's fused attention keeps no matrix of scores, and computes it again in the backward pass. On
    CPUs with products in bfloat16 products of whole matrices take less time in both passes. Other
    models, and long sequences, are left alone.

    Args:
        model: that runs on the batches.
        batches: with `input_ids`.
    """
    lengths = [batch["input_ids"].shape[-1] for batch in batches if "input_ids" in batch]
    short = len(lengths) == len(batches) and max(lengths, default=0) <= _SHORT
    fused = attention_of(getattr(model, "config", None)) == "sdpa"
    if not (short and fused and is_bfloat16_faster(next(model.parameters()))):
        yield
        return
    setting: dict[str, Any] = {ATTENTION_SETTING: "eager"}
    with switched(model, **setting):
        yield
