"""Allocation: how much of the sparsity each block takes.

| name      | blocks get                                                                       |
|-----------|----------------------------------------------------------------------------------|
| `uniform` | the same sparsity                                                                |
| `owl`     | less, the more outliers their Wanda scores have                                  |
| `alpha`   | less, the heavier the tails of their weights' spectra                            |

The mean over all weights stays what was asked for. Sources: Yin et al., "Outlier Weighed Layerwise
Sparsity (OWL)", https://arxiv.org/abs/2310.05175: the share of scores above 5 times their mean,
spread over +-0.08 around the density. Lu et al., "AlphaPruning", https://arxiv.org/abs/2410.10912:
the Hill estimate of the power law of the squared singular values, upper half, spread over +-30 % of
the sparsity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sparse.calibration.input_statistics import Norms
from hf_sparse.calibration.walk import BlockStep, walk
from hf_sparse.patterns import Pattern
from hf_sparse.pruning.task import Task
from hf_sparse.pruning.wanda import wanda_scores
from hf_sparse.structure.layers import TargetLayer, layers_in
from hf_sparse.suggestions import did_you_mean

ALLOCATIONS = ("uniform", "owl", "alpha")

_OUTLIER = 5.0
_OWL_SPREAD = 0.08
_ALPHA_SPREAD = 0.3


def check_allocation(allocation: str, pattern: Pattern) -> None:
    """Refuse unknown allocations, and patterns that leave no choice.

    Raises:
        ValueError: unknown, or anything but `uniform` with N:M.
    """
    if allocation not in ALLOCATIONS:
        raise ValueError(
            f"allocation is {allocation!r}; wanted one of {', '.join(ALLOCATIONS)}."
            f"{did_you_mean(allocation, ALLOCATIONS)}"
        )
    if allocation != "uniform" and pattern.implied_sparsity is not None:
        raise ValueError(
            f"pattern '{pattern}' fixes the sparsity of every block, allocation={allocation!r} has "
            "nothing to choose. Use allocation='uniform'."
        )


def layer_sparsities(allocation: str, task: Task) -> dict[str, float]:
    """The sparsity of each layer, by name; layers outside the blocks get the task's.

    `owl` takes the calibration data once through the dense model.
    """
    blocks: dict[int, list[TargetLayer]] = {}
    scores: dict[int, float] = {}
    if allocation == "alpha":
        for block in (block for stack in task.stacks for block in stack.blocks):
            blocks[id(block)] = layers_in(block, task.layers)
            scores[id(block)] = tail_exponent(blocks[id(block)])
    elif allocation == "owl":
        norms = Norms(task.accelerator)
        for step in walk(**task.data, description="Measuring blocks"):
            blocks[id(step.block)] = layers_in(step.block, task.layers)
            scores[id(step.block)] = outlier_share(step, blocks[id(step.block)], norms)
    sparsity = task.config.sparsity
    sparsities = dict.fromkeys((layer.name for layer in task.layers), sparsity)
    used = {key: inside for key, inside in blocks.items() if inside}
    if used:
        sizes = [sum(layer.weight.numel() for layer in inside) for inside in used.values()]
        shares = block_sparsities([scores[key] for key in used], sizes, sparsity, allocation)
        for inside, share in zip(used.values(), shares, strict=True):
            sparsities.update(dict.fromkeys((layer.name for layer in inside), share))
    return sparsities


def outlier_share(step: BlockStep, layers: Sequence[TargetLayer], norms: Norms) -> float:
    """OWL's score of a block: the share of its Wanda scores above 5 times their mean.

    Memory: the scores of the block.
    """
    with norms.collecting(layers, stop=step.repeats == 1):
        step.run(norms)
    scores = torch.cat(
        [
            wanda_scores(layer.weight, seen.statistic).flatten()
            for seen in norms.groups()
            for layer in seen.layers
        ]
    )
    return float((scores > _OUTLIER * scores.mean()).float().mean())


def tail_exponent(layers: Sequence[TargetLayer]) -> float:
    """AlphaPruning's score of a block, negated: the mean Hill exponent of its layers' spectra."""
    return -sum(_hill(layer.weight.float()) for layer in layers) / max(len(layers), 1)


def _hill(weight: Tensor) -> float:
    spectrum = torch.linalg.svdvals(weight).double().square().clamp_min(1e-30)
    count = max(len(spectrum) // 2, 1)
    top = spectrum[:count]  # in descending order
    least = spectrum[min(count, len(spectrum) - 1)]
    return 1 + count / float((top / least).log().sum().clamp_min(1e-12))


def block_sparsities(
    scores: Sequence[float], sizes: Sequence[int], sparsity: float, allocation: str
) -> list[float]:
    """The sparsity of each block.

    Args:
        scores: of the blocks; a higher one gets fewer zeros.
        sizes: their weights.
        sparsity: the mean over all weights.
        allocation: `"owl"` or `"alpha"`, which tells how far the sparsities spread.
    """
    importance = torch.tensor(scores, dtype=torch.float64)
    shares = torch.tensor(sizes, dtype=torch.float64)
    width = _OWL_SPREAD if allocation == "owl" else _ALPHA_SPREAD * sparsity
    reach = float(importance.max() - importance.min())
    if not reach:
        return [sparsity] * len(scores)
    wanted = -2 * width * (importance - importance.min()) / reach
    return list(_shifted(wanted, shares / shares.sum(), sparsity).tolist())


def _shifted(wanted: Tensor, shares: Tensor, sparsity: float) -> Tensor:
    """`wanted` plus a constant, kept in [0, 0.99], with a weighted mean of `sparsity`."""
    low, high = -1.0, 2.0 + float(wanted.max() - wanted.min())
    clipped = wanted
    for _ in range(100):
        middle = (low + high) / 2
        clipped = (wanted + middle).clamp(0, max(0.99, sparsity))
        if float((clipped * shares).sum()) < sparsity:
            low = middle
        else:
            high = middle
    return clipped
