"""Reconstruction: the weights that a block keeps are trained to give the dense block's output.

After the zeros of a block are chosen, a few passes over the calibration data minimise the error of
the block's output with the zeros fixed. Inputs are what the pruned blocks before it give, targets
what the dense model gives at this place, so that a block also makes up for those before it.

Sources: block reconstruction after pruning, as in https://arxiv.org/abs/2510.14444 and Wanda++
(https://arxiv.org/abs/2503.04992).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.calibration.losses import fast_autocast
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.processes import averaged, steps_per_epoch
from hf_sparse.calibration.recording import Sample
from hf_sparse.calibration.walk import BlockStep
from hf_sparse.structure.layers import TargetLayer, parameters_of

_WARM_UP = 0.05
_BETAS = (0.9, 0.95)


def reconstruct_(
    step: BlockStep,
    layers: Sequence[TargetLayer],
    epochs: int,
    *,
    relative_lr: float = 0.01,
    accelerator: Any = None,
) -> tuple[float, float]:
    """Train the nonzero weights of a block's layers.

    Adam with a cosine schedule, one step per batch; a step changes a weight by about
    `relative_lr` times the root mean square of its layer's nonzero weights. The error of a token
    counts relative to the size of the dense output. If the error has not fallen at the end, the
    weights are put back. On CPUs with bfloat16 products gradients are computed in it.

    Args:
        step: of a walk that follows the dense model.
        layers: of the block; what is zero stays zero.
        epochs: passes over the calibration data.
        relative_lr: see above.
        accelerator: its processes average their gradients.

    Returns:
        The block's relative error before and after.

    Memory: five times the block's weights in fp32, and the activations of one batch.
    """
    parameters = parameters_of(layers)
    weights = [layer.stored(layer.parameter.data) for layer in layers]
    start = [weight.clone() for weight in weights]
    masters = [weight.float().clone() for weight in weights]
    masks = [master != 0 for master in masters]
    optimizer = torch.optim.Adam(
        [
            {"params": [master], "lr": relative_lr * _rms(master[mask])}
            for master, mask in zip(masters, masks, strict=True)
        ],
        betas=_BETAS,
        fused=True,
    )
    count = steps_per_epoch(len(step.samples), accelerator)
    total = epochs * count
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: _schedule(n / total))
    generator = torch.Generator().manual_seed(0)
    before = _error(step, accelerator)
    with switched(step.block, trained=parameters):
        for _ in range(epochs):
            for index in torch.randperm(count, generator=generator).tolist():
                sample = step.samples[index % len(step.samples)]
                grads = _gradients(step, sample, parameters, accelerator)
                for layer, master, mask in zip(layers, masters, masks, strict=True):
                    grad = layer.stored(grads[id(layer.parameter)])
                    master.grad = grad.float().mul_(mask)
                optimizer.step()
                schedule.step()
                for weight, master in zip(weights, masters, strict=True):
                    weight.copy_(master)
    after = _error(step, accelerator)
    if after < before:
        return before, after
    for weight, before_it in zip(weights, start, strict=True):
        weight.copy_(before_it)
    return before, before


def _gradients(
    step: BlockStep, sample: Sample, parameters: Sequence[nn.Parameter], accelerator: Any
) -> dict[int, Tensor]:
    """The gradient of each parameter, by its identity."""
    with fast_autocast(step.block):
        output = step.forward(sample)
    grads = torch.autograd.grad(_loss(output, sample), parameters, allow_unused=True)
    return {
        id(parameter): averaged(torch.zeros_like(parameter) if grad is None else grad, accelerator)
        for parameter, grad in zip(parameters, grads, strict=True)
    }


def _loss(output: Tensor, sample: Sample) -> Tensor:
    """Mean over the tokens that count of `||y - t||² / ||t||²`."""
    target = sample.dense
    if target is None:
        raise ValueError("the walk does not follow the dense model; wanted follow_dense=True.")
    target = target.to(output.device).float()
    lost = (output.float() - target).square().sum(dim=-1)
    shares = lost / target.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    mask = sample.masks.tokens
    if mask is None or mask.shape != shares.shape:
        return shares.mean()
    mask = mask.to(shares)
    return (shares * mask).sum() / mask.sum().clamp_min(1)


def _error(step: BlockStep, accelerator: Any) -> float:
    losses = torch.stack([_loss(step.forward(sample), sample) for sample in step.samples])
    return float(averaged(losses.mean(), accelerator))


def _schedule(done: float) -> float:
    """Share of the learning rate after a share of the steps: warm-up, then a cosine to 0."""
    if done < _WARM_UP:
        return (done + 1e-3) / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
