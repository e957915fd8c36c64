"""When the zeros come: how far on the way to the wanted sparsity a training run is at each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_sparse.arguments import check_kinds
from hf_sparse.suggestions import check_name

# Progress in [0, 1] as a function of time in [0, 1] between the beginning and the end.
SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda time: 1.0,
    "linear": lambda time: time,
    "cubic": lambda time: 1 - (1 - time) ** 3,
}


@dataclass(frozen=True)
class Schedule:
    """The course of the sparsity over a training run.

    Args:
        shape: `"cubic"` (fast at first, slow near the end; Zhu and Gupta,
            https://arxiv.org/abs/1710.01878), `"linear"`, or `"constant"` (all at the beginning).
        begin: fraction of the run before which the model stays as it is.
        end: fraction of the run after which the mask is frozen and the rest is recovery.

    Raises:
        ValueError: an unknown shape, or fractions that are not `0 <= begin <= end <= 1`.
    """

    shape: str = "cubic"
    begin: float = 0.1
    end: float = 0.6

    def __post_init__(self) -> None:
        check_name(self.shape, SHAPES, "schedule", "schedules")
        if any(isinstance(time, bool | str) for time in (self.begin, self.end)):
            raise ValueError(f"begin={self.begin!r}, end={self.end!r}; wanted numbers in [0, 1].")
        check_kinds(Schedule, vars(self))
        if not 0 <= self.begin <= self.end <= 1:
            raise ValueError(
                f"the schedule runs from {self.begin} to {self.end} of the training; wanted fractions "
                "0 <= begin <= end <= 1."
            )

    def progress(self, step: int, total_steps: int) -> float:
        """How much of the way to the target is due after `step` of `total_steps`: 0 to 1."""
        first, last = self.begin * total_steps, self.last_step(total_steps)
        if step >= last:
            return 1.0
        if step < first:
            return 0.0
        return SHAPES[self.shape]((step - first) / (last - first))

    def last_step(self, total_steps: int) -> int:
        """The step after which the mask is frozen: at least 1, at most `total_steps`."""
        return max(round(self.end * total_steps), 1)
