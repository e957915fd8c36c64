"""What was done to a model, in order: how its zeros were made, and what came after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# The attribute of a model that remembers its steps.
_STEPS = "_hf_sparse_steps"


@dataclass(frozen=True)
class Step:
    """A method and its options, as the model card tells them."""

    method: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, method: str, options: Mapping[str, Any]) -> Step:
        """The step of a report."""
        return cls(method, tuple((name, str(value)) for name, value in sorted(options.items())))


def steps_of(model: Any) -> tuple[Step, ...]:
    """The steps that are known of a model; none if nothing is known."""
    steps: tuple[Step, ...] = vars(model).get(_STEPS, ())
    return steps


def remember_(model: Any, steps: Iterable[Step]) -> None:
    """Add steps to those that are known of a model."""
    vars(model)[_STEPS] = (*steps_of(model), *steps)
