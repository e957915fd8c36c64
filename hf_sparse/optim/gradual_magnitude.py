"""Gradual magnitude pruning, the baseline of the field.

Source: Zhu and Gupta, "To prune, or not to prune", https://arxiv.org/abs/1710.01878.
"""

from __future__ import annotations

from torch.optim import Optimizer

from hf_sparse.optim.parameters import set_strength, sparse_groups
from hf_sparse.optim.projection import magnitude, project_


class GradualMagnitude:
    """Gradual magnitude pruning: from time to time the smallest weights go, for good."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        set_strength(optimizer, 0.0)

    def approach(self, share: float, steps: int) -> None:
        for group in sparse_groups(self._optimizer):
            group["frozen"] = True
        project_(self._optimizer, share, magnitude)

    def release(self) -> None:
        pass

    def finish(self, share: float) -> None:
        project_(self._optimizer, share, magnitude)
