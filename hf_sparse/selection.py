"""Choosing zeros over many weights at once, by one threshold for all of them.

The unit of choice is what a pattern prunes as a whole: a weight, a block, a row, or the surplus
weights of one N:M group. Units of different weights compare by their scores; groups of different
sizes by their mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hf_sparse.patterns import Pattern


class Processes:
    """The processes that share the weights' shards. This one is alone."""

    rank = 0
    size = 1

    def sum_(self, tensor: Tensor) -> None:
        """Add the tensor up over the processes, in place."""


ALONE = Processes()


def global_masks(
    scores: Callable[[], Iterator[Tensor]],
    pattern: Pattern,
    share: float,
    processes: Processes = ALONE,
) -> Iterator[Tensor]:
    """Choose the units of lowest score over many weights.

    Args:
        scores: gives the weights' scores anew at each call, `(out_features, in_features)` each,
            non-negative. They are read four times and never held together.
        pattern: what a unit is.
        share: fraction of all units to prune, in `[0, 1]`. For N:M, the share of its groups.
        processes: where each holds a shard of every weight; all of them must call this.

    Yields:
        For each weight, a boolean mask of the weights to prune. Exactly `round(share * units)`
        units are marked; of equal scores the earlier one first.

    Raises:
        ValueError: a score is NaN or infinite, or the pattern cannot divide a weight.
    """

    def parts() -> Iterator[Tensor]:
        return (pattern.units(part) for part in scores())

    units, damaged = 0, 0
    for part in parts():
        units += part.numel()
        damaged += int((~torch.isfinite(part)).sum())
    totals = torch.tensor([units, damaged])
    processes.sum_(totals)
    if totals[1]:
        raise ValueError(f"{totals[1]} scores are NaN or infinite; wanted finite scores.")
    count = round(share * int(totals[0]))
    if count == 0:
        yield from (torch.zeros_like(part, dtype=torch.bool) for part in scores())
        return
    threshold, ties = kth_smallest(parts, count, processes)
    if processes.size > 1:
        ties -= _ties_before(parts, threshold, processes)
    for part in scores():
        values = pattern.units(part)
        tied = (values == threshold).reshape(-1)
        chosen = tied & (tied.cumsum(0) <= ties)
        ties -= int(chosen.sum())
        pruned = (values < threshold) | chosen.view(values.shape)
        yield pattern.expand(pruned, part)


def kth_smallest(
    parts: Callable[[], Iterator[Tensor]], count: int, processes: Processes = ALONE
) -> tuple[float, int]:
    """The `count`-th smallest of many tensors' values, without gathering them.

    Non-negative floats have the order of their bit patterns, so two histograms of 16 bits each
    find the value exactly.

    Args:
        parts: gives the tensors anew at each call, fp32, non-negative and finite.
        count: from 1 to the number of values.
        processes: the others that hold parts.

    Returns:
        The value, and how many of the values equal to it are among the `count` smallest.
    """
    high, below = _bin_of(parts, count, processes, lambda bits: bits >> 16)
    low, ties = _bin_of(
        parts, count - below, processes, lambda bits: bits[bits >> 16 == high] & 0xFFFF
    )
    threshold = torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32)
    return float(threshold), count - below - ties


def _bin_of(
    parts: Callable[[], Iterator[Tensor]],
    count: int,
    processes: Processes,
    key: Callable[[Tensor], Tensor],
) -> tuple[int, int]:
    """The bin in which the `count`-th smallest key falls, and how many keys are below it."""
    histogram = torch.zeros(1 << 16, dtype=torch.int64)
    for part in parts():
        keys = key(part.contiguous().view(torch.int32).reshape(-1))
        histogram += torch.bincount(keys, minlength=1 << 16).cpu()
    processes.sum_(histogram)
    upto = histogram.cumsum(0)
    bin_of_count = int(torch.searchsorted(upto, count))
    return bin_of_count, int(upto[bin_of_count] - histogram[bin_of_count])


def _ties_before(
    parts: Callable[[], Iterator[Tensor]], threshold: float, processes: Processes
) -> int:
    """How many scores equal to the threshold the processes of lower rank hold."""
    counts = torch.zeros(processes.size, dtype=torch.int64)
    counts[processes.rank] = sum(int((part == threshold).sum()) for part in parts())
    processes.sum_(counts)
    return int(counts[: processes.rank].sum())
