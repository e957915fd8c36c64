"""Taylor: what the loss hardly notices goes.

Source: Molchanov et al., "Importance Estimation for Neural Network Pruning",
https://arxiv.org/abs/1906.10771, and for attention heads Michel et al., "Are Sixteen Heads Really
Better than One?", https://arxiv.org/abs/1905.10650.

To first order the loss of a batch changes by `-sum w dL/dw` over the weights of a unit when the unit
is set to zero. The score is the square of that, summed over the batches:

    score = sum over batches (sum over the unit's weights w dL/dw)²

For patterns of groups a unit is a group: with `head` a whole attention head, with `column` a whole
neuron, since all that either does goes through its columns. For others it is a single weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_sparse.calibration.attending import fast_attention
from hf_sparse.calibration.losses import check_labels, loss_of
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.processes import summed
from hf_sparse.calibration.progress import steps
from hf_sparse.patterns import Pattern
from hf_sparse.pruning.magnitude import by_scope
from hf_sparse.pruning.task import Task
from hf_sparse.structure.layers import TargetLayer, parameters_of


def masks(task: Task, *, scope: str = "layer") -> Iterator[tuple[TargetLayer, Tensor]]:
    """Choose the units of highest score.

    Args:
        task: what to prune, with batches that have `labels` unless the model is a causal one.
        scope: `"layer"`: every layer gets its sparsity. `"global"`: all layers together do, each
            unit by the mean of its score over its weights.

    Yields:
        A layer, and the boolean mask of the weights to keep.

    Memory: the gradients of the layers' weights, a score for each unit, and what a backward pass
    needs for the activations of one batch.

    Raises:
        ValueError: batches without labels for a model that does not predict its next token; a loss
            that is not finite.
    """
    check_labels("taylor", "wanda", task.model, task.batches)
    pattern = task.config.pattern
    unit_scores = {
        name: summed(score, task.accelerator).sqrt() for name, score in _unit_scores(task).items()
    }

    def score(layer: TargetLayer) -> Tensor:
        return pattern.spread(unit_scores[layer.name], layer.weight.shape)

    yield from by_scope(task, score, scope)


def _unit_scores(task: Task) -> dict[str, Tensor]:
    """The score of each unit of each layer."""
    pattern = task.config.pattern
    parameters = parameters_of(task.layers)
    found: dict[str, Tensor] = {}
    with switched(task.model, trained=parameters), fast_attention(task.model, task.batches):
        for batch in steps(task.batches, "Measuring gradients"):
            grads = torch.autograd.grad(loss_of(task.model, batch), parameters, allow_unused=True)
            by_parameter = {id(p): grad for p, grad in zip(parameters, grads, strict=True)}
            for layer in task.layers:
                grad = by_parameter[id(layer.parameter)]
                if grad is None:  # an expert that no token reached
                    grad = torch.zeros_like(layer.parameter)
                with torch.no_grad():
                    effect = _effects(layer, grad, pattern).square()
                found[layer.name] = found[layer.name] + effect if layer.name in found else effect
    return found


def _effects(layer: TargetLayer, grad: Tensor, pattern: Pattern) -> Tensor:
    """`sum w dL/dw` of each unit, fp32."""
    product = layer.weight.float() * layer.part(grad).float()
    return pattern.sums(product)
