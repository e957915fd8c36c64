"""What `hf_sparse.drop_experts_` and `hf_sparse.shrink_` tell of the experts that they removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_sparse.report import StepReport, format_table

# How experts were chosen that `shrink_` removes.
ZEROS = "zeros"


@dataclass(frozen=True, repr=False)
class ExpertReport(StepReport):
    """Which experts `drop_experts_` removed, or `shrink_` of those that were zero.

    Attributes:
        names: of the modules that hold the experts.
        by: how they were chosen; "zeros": they were zero.
        merged: whether what went was averaged into what stays.
        removed: for each mixture the numbers of those that went, as they were.
        scores: for each mixture those of all its experts; of zeros the norms of their weights.
        tokens: for each mixture how many each of its experts got; None where no data was looked at.
        experts: in each mixture, before and after.
        parameters: weights in the whole model, before and after.
        notes: what the reader should know.
    """

    names: tuple[str, ...]
    by: str
    merged: bool
    removed: tuple[tuple[int, ...], ...]
    scores: tuple[tuple[float, ...], ...]
    tokens: tuple[tuple[int, ...], ...] | None
    experts: tuple[int, int]
    parameters: tuple[int, int]
    notes: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """The name of the step on the model card."""
        return "shrink" if self.by == ZEROS else "drop_experts"

    @property
    def options(self) -> dict[str, Any]:
        """What the card tells of it."""
        kept = {"by": self.by, "experts": f"{self.experts[1]} of {self.experts[0]}"}
        return {**kept, "merge": True} if self.merged else kept

    def summary(self) -> str:
        """The totals in a few lines."""
        went = "were merged into the others" if self.merged else "went"
        how = "they were zero" if self.by == ZEROS else f"by {self.by}"
        return "\n".join(
            [
                f"{self.experts[1]} of {self.experts[0]} experts are left in each of "
                f"{len(self.names)} blocks: the others {went}, {how}",
                f"whole model: {self.parameters[1]:,} of {self.parameters[0]:,} weights",
                *self.notes,
            ]
        )

    def table(self) -> str:
        """A row for each mixture, and the totals."""
        rows = []
        for name, gone, scores in zip(self.names, self.removed, self.scores, strict=True):
            stay = [score for number, score in enumerate(scores) if number not in gone]
            went = [scores[number] for number in gone]
            rows.append((name, ", ".join(map(str, gone)), f"{max(went):.4g}", f"{min(stay):.4g}"))
        head = ("experts", "removed", "their highest score", "lowest that stays")
        return f"{format_table(head, rows)}\n{self.summary()}"
