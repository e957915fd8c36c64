"""Where a matrix is, as its name tells: in which blocks, in which of them, of which kind and expert."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """The place of a matrix in a model.

    Attributes:
        stack: the name of the repeated blocks, `model.layers`; empty outside of them.
        block: the number of its block; None outside of them.
        kind: the name inside the block without the expert's number, `mlp.experts.down_proj`.
        expert: the expert's number, if it is one's.
    """

    stack: str
    block: int | None
    kind: str
    expert: int | None = None

    @classmethod
    def of(cls, name: str) -> Place:
        """Read the name of a weight, as `TensorSparsity` has it."""
        parts = [part for part in name.split(".") if part != "weight"] or [name]
        numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
        if not numbers:
            return cls("", None, ".".join(parts))
        first = numbers[0]
        inner = [part for part in parts[first + 1 :] if not part.isdecimal()]
        # In a block, a number stands for an expert where "experts" is near it.
        of_expert = [index for index in numbers[1:] if "experts" in parts[first + 1 : index]]
        expert = int(parts[of_expert[0]]) if of_expert else None
        if expert is None and len(numbers) > 1:  # other lists inside a block are kinds of their own
            inner = parts[first + 1 :]
        return cls(".".join(parts[:first]), int(parts[first]), ".".join(inner) or name, expert)
