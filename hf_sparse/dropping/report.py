"""What `hf_sparse.drop_blocks_` tells of the blocks that it removed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hf_sparse.report import StepReport, format_table


@dataclass(frozen=True, repr=False)
class DropReport(StepReport):
    """Which blocks `drop_blocks_` removed.

    Attributes:
        name: of the list of blocks, or of those of encoder and decoder.
        by: how they were chosen.
        removed: their numbers in the model as it was, in the order in which they were chosen; those
            of a decoder follow those of its encoder.
        scores: what each of them was chosen by: the loss without it and those before it, or its
            influence.
        blocks: before and after.
        parameters: weights in the whole model, before and after.
        loss: on the calibration data, before and after; None where it was not measured.
        all_scores: of all blocks of the whole model; None: the block could not go.
        names: of all blocks of the whole model.
    """

    # The name of the step on the model card.
    method = "drop_blocks"

    name: str
    by: str
    removed: tuple[int, ...]
    scores: tuple[float, ...]
    blocks: tuple[int, int]
    parameters: tuple[int, int]
    loss: tuple[float, float] | None
    all_scores: tuple[float | None, ...]
    names: tuple[str, ...]

    @property
    def options(self) -> dict[str, Any]:
        """What the card tells of it."""
        return {"by": self.by, "removed": self._told(self.removed)}

    def summary(self) -> str:
        """The totals in a few lines."""
        lines = [
            f"{self.blocks[1]} of {self.blocks[0]} blocks are left of {self.name}: "
            f"{self._told(sorted(self.removed))} went, by {self.by}",
            f"whole model: {self.parameters[1]:,} of {self.parameters[0]:,} weights",
        ]
        if self.loss is not None:
            lines.append(
                f"loss on the calibration data: {self.loss[0]:.4f} before, {self.loss[1]:.4f} after"
            )
        return "\n".join(lines)

    def table(self) -> str:
        """A row for each block of the whole model, and the totals."""
        turns = {number: turn for turn, number in enumerate(self.removed, start=1)}
        title = "loss without it" if self.by == "loss" else "influence"
        rows = [
            (
                self.names[number],
                "has to stay" if score is None else f"{score:.4f}",
                f"removed ({turns[number]})" if number in turns else "",
            )
            for number, score in enumerate(self.all_scores)
        ]
        return f"{format_table(('block', title, ''), rows)}\n{self.summary()}"

    def _told(self, numbers: Iterable[int]) -> str:
        """Blocks by number, or by name where there are two lists."""
        several = " and " in self.name
        return ", ".join(self.names[number] if several else str(number) for number in numbers)
