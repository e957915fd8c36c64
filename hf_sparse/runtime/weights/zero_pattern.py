"""Which pattern the zeros of a weight follow, whoever made them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.patterns import NM, Block, Pattern, Unstructured

# From the strictest on: the first that holds is the one that is named.
_KNOWN: tuple[Pattern, ...] = (
    Block(16, 1),
    Block(8, 1),
    Block(4, 1),
    Block(2, 1),
    NM(1, 4),
    NM(2, 8),
    NM(2, 4),
    NM(4, 8),
)
# Rows that most weights of another pattern fail on.
_SAMPLE = 64
# An N:M pattern that someone chose has nearly all of its N nonzeros.
_CHOSEN = 0.9


def find_pattern(weight: Tensor) -> Pattern | None:
    """The strictest known pattern that `weight` `(out_features, in_features)` follows.

    Returns:
        None if the weight has no zeros.
    """
    density = int(torch.count_nonzero(weight)) / weight.numel()
    if density == 1:
        return None
    for pattern in _KNOWN:
        fixed = pattern.implied_sparsity
        if fixed is not None and density < _CHOSEN * (1 - fixed):
            continue  # so few nonzeros that they keep to N of M by chance
        try:
            pattern.check_shape(*weight.shape)
            sample = weight[: min(_SAMPLE, len(weight))]
            if pattern.follows(sample) and pattern.follows(weight):
                return pattern
        except ValueError:
            continue
    return Unstructured()
