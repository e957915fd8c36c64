"""Gradual magnitude pruning, the baseline of the field.

Source: Zhu and Gupta, "To prune, or not to prune", https://arxiv.org/abs/1710.01878.
"""

from __future__ import annotations

from typing import ClassVar

from torch.optim import Optimizer

from hf_sparse.arguments import Bound
from hf_sparse.optim.parameters import set_strength
from hf_sparse.optim.projection import magnitude, project_
from hf_sparse.optim.shrinkage import freeze_groups


class GradualMagnitude:
    """Gradual magnitude pruning: from time to time the smallest weights go, for good."""

    bounds: ClassVar[dict[str, Bound]] = {}

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        set_strength(optimizer, 0.0)

    def approach(self, share: float, steps: int) -> None:
        freeze_groups(self._optimizer)
        project_(self._optimizer, share, magnitude)

    def release(self) -> None:
        pass

    def finish(self, share: float) -> None:
        project_(self._optimizer, share, magnitude)
