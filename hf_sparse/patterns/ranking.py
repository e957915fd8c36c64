"""Marking the lowest scores: exact counts, and of equal scores the one with the lower index first."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

# Groups up to this length are ranked by comparing each pair: faster than selecting, and as exact.
_SHORT = 16


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest scores of each row, exactly.

    Of equal scores the one with the lower index is marked first, as a stable ascending sort would
    do; this selects in linear time instead of sorting.

    Args:
        scores: `(rows, columns)`.
        count: `0 <= count <= columns`.

    Returns:
        Boolean `(rows, columns)` with `count` True in each row.
    """
    if count == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    scores = widened(scores)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below, tied = scores < threshold, scores == threshold
    missing = count - below.sum(dim=1, keepdim=True)
    return below | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= missing))


def lowest_in_groups(groups: Tensor, count: int) -> Tensor:
    """`lowest` for many short rows, `(groups, m)`."""
    m = groups.shape[1]
    if m > _SHORT:
        return lowest(groups, count)
    columns = groups.unbind(1)
    # The rank of a weight is the number of weights in its group that are pruned before it.
    rank = [torch.zeros_like(column, dtype=torch.int16) for column in columns]
    for first, second in combinations(range(m), 2):
        before = columns[first] <= columns[second]
        rank[second] += before
        rank[first] += ~before
    return torch.stack(rank, dim=1) < count


def lowest_share(scores: Tensor, share: float) -> Tensor:
    """Mark `round(share * scores.numel())` scores, as evenly over the rows as whole counts allow."""
    rows = scores.shape[0]
    upto = [round(share * scores.numel()) * row // max(rows, 1) for row in range(rows + 1)]
    counts = torch.tensor(upto, device=scores.device).diff()
    marked = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for count in counts.unique().tolist():
        chosen = counts == count
        if chosen.all():
            return lowest(scores, count)
        marked[chosen] = lowest(scores[chosen], count)
    return marked


def widened(scores: Tensor) -> Tensor:
    """The scores in fp32, or in fp64 if that is what they are."""
    return scores if scores.dtype == torch.float64 else scores.float()


def check_scores(scores: Tensor, sparsity: float) -> None:
    """Raise a ValueError if these are no scores to choose such a share of."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; wanted a fraction of zeros in [0, 1).")
    if scores.ndim != 2:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}; wanted (out_features, in_features)."
        )
    if not torch.isfinite(scores).all():
        raise ValueError("scores contain NaN or infinity; wanted finite scores.")
