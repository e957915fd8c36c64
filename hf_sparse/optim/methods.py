"""Ways to reach a wanted sparsity while training: the proximal one and the field's baselines.

| method      | source                                                                          |
|-------------|---------------------------------------------------------------------------------|
| `proximal`  | SparseOptimizer, https://arxiv.org/abs/2306.15656                               |
| `magnitude` | gradual magnitude pruning, Zhu and Gupta, https://arxiv.org/abs/1710.01878      |
| `movement`  | soft movement pruning, Sanh et al., https://arxiv.org/abs/2005.07683            |

A method is told, from time to time, which share of the units should be zero by now.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch.optim import Optimizer

from hf_sparse.optim.gradual_magnitude import GradualMagnitude
from hf_sparse.optim.movement import SoftMovement
from hf_sparse.optim.proximal import Proximal


class TrainingMethod(Protocol):
    """What a `Sparsifier` drives."""

    def __init__(self, optimizer: Optimizer, **options: Any) -> None: ...

    def approach(self, share: float, steps: int) -> None:
        """See to it that in `steps` steps about `share` of the units are zero."""

    def release(self) -> None:
        """Get ready to finish after the next step."""

    def finish(self, share: float) -> None:
        """Make exactly `share` of the units zero."""


TRAINING_METHODS: dict[str, type[TrainingMethod]] = {
    "proximal": Proximal,
    "magnitude": GradualMagnitude,
    "movement": SoftMovement,
}
