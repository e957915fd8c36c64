"""What training a block and training a whole model have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.calibration.calling import run_on
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.recording import Batch
from hf_sparse.upstream.torch import onednn
from hf_sparse.upstream.transformers.experts import runs_in_autocast


class NotFiniteError(ValueError):
    """The loss of a model is infinite or no number."""


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, and torch uses them."""
    supported = onednn("_is_mkldnn_bf16_supported")
    return supported is not None and bool(supported())


def is_bfloat16_faster(tensor: Tensor) -> bool:
    """Whether this is an fp32 tensor on a CPU that multiplies faster in bfloat16."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and multiplies_bfloat16()


def fast_autocast(module: nn.Module) -> torch.autocast:
    """Products in bfloat16 where a module's weights are fp32 and a CPU multiplies faster in it."""
    enabled = is_bfloat16_faster(next(module.parameters())) and runs_in_autocast(module)
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def check_labels(
    method: str, other: str | None, model: nn.Module, batches: Sequence[Batch]
) -> None:
    """Refuse batches that the model has no loss on.

    Args:
        method: that needs the loss.
        other: a method that does not, if there is one.
        model: the model.
        batches: its inputs.

    Raises:
        ValueError: labels are missing, and the model does not predict its next token.
    """
    if any("labels" not in batch and "input_ids" not in batch for batch in batches):
        raise ValueError("a batch has neither labels nor input_ids to learn from. Put labels in.")
    if all("labels" in batch for batch in batches):
        return
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        way_out = f", or use method='{other}', which needs none." if other else "."
        raise ValueError(
            f"method '{method}' needs the loss of {type(model).__name__}, and the batches have no "
            f"labels. Put labels into them ({_how(model)}){way_out}"
        )


def _how(model: nn.Module) -> str:
    """What gives the labels of a kind of models."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "see hf_sparse.labelled_batches"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return (
            "of a model with encoder and decoder the tokens of the target text: "
            "batch['labels'] = tokenizer(text_target=..., return_tensors='pt')['input_ids']"
        )
    return "batch['labels'], as the model's forward takes them"


def with_labels(batch: Batch) -> dict[str, Any]:
    """The batch, with its tokens as labels if it has none: a causal model predicts the next one."""
    inputs = dict(batch)
    if "labels" not in inputs:
        labels = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape == labels.shape:
            labels = labels.masked_fill(mask == 0, -100)
        inputs["labels"] = labels
    return inputs


def check_predicts(batch: Batch) -> None:
    """Refuse a batch with labels on which there is nothing to predict.

    Raises:
        ValueError: it is too short, or all of it is masked.
    """
    labels = batch["labels"]
    if labels.ndim > 1 and not (labels[..., 1:] != -100).any():
        raise ValueError(
            "a batch has no token to predict: it is too short, or masked out. Leave it out."
        )


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The model's loss on a batch; a causal model without labels predicts the next token.

    Raises:
        ValueError: there is no token to predict, or the loss is not finite.
    """
    inputs = with_labels(batch)
    with fast_autocast(model):
        loss: Tensor = run_on(model, inputs).loss
    check_predicts(inputs)
    check_finite(model, float(loss.detach()))
    return loss


def check_finite(model: nn.Module, loss: float) -> None:
    """Raise a NotFiniteError if the loss of a model that is trained is infinite or no number."""
    if not math.isfinite(loss):
        raise NotFiniteError(
            f"the loss of {type(model).__name__} is {loss} while it is trained. Lower "
            "the learning rate or lam, if the method has them, or load the model in float32."
        )


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The model's loss in eval mode, by the number of labels of each batch; nan without any.

    It may be infinite or no number; a causal model without labels predicts the next token.

    Raises:
        ValueError: there is no token to predict.
    """
    total, count = 0.0, 0
    with switched(model, training=False):
        for batch in batches:
            inputs = with_labels(batch)
            check_predicts(inputs)
            labels = int((inputs["labels"] != -100).sum())
            total += labels * float(run_on(model, inputs).loss)
            count += labels
    return total / count if count else math.nan
