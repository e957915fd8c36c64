"""Ways to reach a wanted sparsity while training: the proximal one and the field's baselines.

| method      | source                                                                          |
|-------------|---------------------------------------------------------------------------------|
| `proximal`  | SparseOptimizer, https://arxiv.org/abs/2306.15656                               |
| `magnitude` | gradual magnitude pruning, Zhu and Gupta, https://arxiv.org/abs/1710.01878      |
| `movement`  | soft movement pruning, Sanh et al., https://arxiv.org/abs/2005.07683            |
| `admm`      | ADMM as ELSA, https://arxiv.org/abs/2510.01650                                  |

A method is told, from time to time, which share of the units should be zero by now.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch.optim import Optimizer

from hf_sparse.arguments import Bound, check_kinds
from hf_sparse.optim.admm import Admm
from hf_sparse.optim.gradual_magnitude import GradualMagnitude
from hf_sparse.optim.movement import SoftMovement
from hf_sparse.optim.proximal import Proximal
from hf_sparse.suggestions import check_name, did_you_mean, shortened


class TrainingMethod(Protocol):
    """What a `Sparsifier` drives.

    Attributes:
        bounds: of its options: whether a value is inside, and how an error says so.
    """

    bounds: ClassVar[dict[str, Bound]]

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
    "admm": Admm,
}


def check_method(name: str, options: Mapping[str, Any]) -> None:
    """Refuse an unknown method, and options that it does not have or that are out of range.

    Raises:
        ValueError: what was found, and what was wanted.
    """
    check_name(name, TRAINING_METHODS, "method", "methods")
    method = TRAINING_METHODS[name]
    own = [
        parameter.name
        for parameter in inspect.signature(method).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    if unknown := sorted(set(options) - set(own)):
        raise ValueError(
            f"method '{name}' has no option {', '.join(unknown)}. Its options: "
            f"{', '.join(own) or 'none'}.{did_you_mean(unknown[0], own)}"
        )
    check_kinds(method, options)
    for option, value in options.items():
        is_inside, wanted = method.bounds[option]
        if not is_inside(value):
            raise ValueError(f"{option} is {shortened(value)}; wanted {wanted}.")
