"""Merging of experts: what one that goes held is averaged into the nearest one that stays.

Source: Li et al., "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy",
https://arxiv.org/abs/2310.01334, who merge experts that are routed to alike, weighted by how often
they are chosen. Departure: the neurons of experts are not put into a common order first; experts are
routed to alike when the router's rows for them point the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sparse.structure.experts import ExpertStack


def nearest(rows: Tensor, kept: Sequence[int]) -> list[int]:
    """For each expert the one of `kept` that is routed to most alike; a kept one's is itself.

    Args:
        rows: of the router, `(experts, hidden)`.
        kept: the numbers of those that stay.
    """
    units = torch.nn.functional.normalize(rows.double(), dim=1)
    cosines = units @ units[list(kept)].T
    nearest_kept = [kept[place] for place in cosines.argmax(dim=1).tolist()]
    for expert in kept:
        nearest_kept[expert] = expert
    return nearest_kept


@torch.no_grad()
def merge_(stack: ExpertStack, into: Sequence[int], tokens: Tensor) -> None:
    """Let each kept expert hold the mean of those that go into it, weighted by their tokens.

    Args:
        stack: the experts, of which those that go are still there.
        into: for each expert the number of the one that it goes into.
        tokens: how many each of them got, `(experts,)`; where a group got none, all weigh the same.
    """
    names = list(stack.parameters)
    module = stack.module
    names += [f"{name}_bias" for name in names if getattr(module, f"{name}_bias", None) is not None]
    for target in sorted(set(into)):
        group = [expert for expert, other in enumerate(into) if other == target]
        if len(group) == 1:
            continue
        counts = tokens[group].double()
        shares = counts / counts.sum() if counts.sum() else torch.full_like(counts, 1 / len(group))
        for name in names:
            held = getattr(module, name).data
            mean = sum(
                share * held[expert].double()
                for share, expert in zip(shares.tolist(), group, strict=True)
            )
            held[target] = mean.to(held.dtype)  # type: ignore[union-attr]
