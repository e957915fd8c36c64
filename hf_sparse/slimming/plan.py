"""What `hf_sparse.plan_slim` finds: the mixes that keep to a budget, their losses, and the best one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_sparse.provenance.values import Calibration
from hf_sparse.report import format_table
from hf_sparse.slimming.experts import ExpertRanking
from hf_sparse.slimming.width import Ranking
from hf_sparse.structure.parts import BlockSize


@dataclass(frozen=True)
class SlimChoice:
    """A mix of axes that keeps to the budget.

    Attributes:
        removed: numbers of the blocks that go, in the order in which they were chosen.
        size: of the blocks that stay; None: their size is not looked at.
        cost: in the plan's unit.
        loss: on the calibration data.
        experts: of each block; None: they are not looked at.
    """

    removed: tuple[int, ...]
    size: BlockSize | None
    cost: float
    loss: float
    experts: int | None = None


@dataclass(frozen=True)
class SlimPlan:
    """The mixes that were tried; `str` gives a table. `slim_(model, plan=plan)` follows the best one.

    Attributes:
        kind: the class of the model.
        budget: as it was asked for, such as "params=0.7".
        axes: what may be cut, keys of `AXES`.
        unit: of costs: "weights", "MB" or "ms".
        limit: the cost that the budget allows.
        cost, loss: those of the whole model.
        blocks: the number of blocks of the whole model.
        size: the size of its blocks; None where only their number may be cut.
        choices: the mixes that keep to the budget.
        calibration: the data that losses were measured on.
        ranking: which units of each block stay.
        experts: how many each block has; None: they are not looked at.
        expert_ranking: which of them stay.
    """

    kind: str
    budget: str
    axes: tuple[str, ...]
    unit: str
    limit: float
    cost: float
    loss: float
    blocks: int
    size: BlockSize | None
    choices: tuple[SlimChoice, ...]
    calibration: Calibration
    ranking: Ranking | None = field(repr=False)
    experts: int | None = None
    expert_ranking: ExpertRanking | None = field(default=None, repr=False)

    @property
    def best(self) -> SlimChoice:
        """The one of least loss."""
        return min(self.choices, key=lambda choice: choice.loss)

    @property
    def options(self) -> dict[str, Any]:
        """What the card tells of it."""
        best = self.best
        told: dict[str, Any] = {"budget": self.budget, "axes": ", ".join(self.axes)}
        if best.removed:
            told["removed"] = ", ".join(map(str, sorted(best.removed)))
        if best.size is not None and best.size != self.size:
            told |= {"heads": best.size.heads, "neurons": best.size.neurons}
        if best.experts is not None and best.experts != self.experts:
            told["experts"] = f"{best.experts} of {self.experts}"
        return told

    def to_json(self) -> str:
        """All but the rankings as JSON text."""
        left_out = ("ranking", "expert_ranking")
        values = {name: value for name, value in vars(self).items() if name not in left_out}
        values["choices"] = [asdict(choice) for choice in self.choices]
        for name in ("size", "calibration"):
            values[name] = None if values[name] is None else asdict(values[name])
        return json.dumps({**values, "best": asdict(self.best)}, indent=2)

    def __repr__(self) -> str:
        best = self.best
        size = "" if best.size is None else f" of {_told(best.size)}"
        size += "" if best.experts is None else f" of {best.experts} experts"
        return (
            f"<SlimPlan for {self.budget}: {self.blocks - len(best.removed)} of {self.blocks} blocks"
            f"{size}, {best.cost:,.6g} of {self.cost:,.6g} {self.unit}, loss {self.loss:.4f} -> "
            f"{best.loss:.4f}>"
        )

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """A row for each mix, the best one marked, and what it means."""
        whole = SlimChoice((), self.size, self.cost, self.loss, self.experts)
        rows = [_row(self, whole, "whole model")]
        rows += [
            _row(self, choice, "best" if choice is self.best else "") for choice in self.choices
        ]
        parts = ("heads", "neurons") if self.experts is None else ("experts",)
        head = ("blocks", *parts, self.unit, "loss", "")
        lines = [
            format_table(head, rows),
            f"{self.budget}: at most {self.limit:,.6g} of {self.cost:,.6g} {self.unit}, by "
            f"{' and '.join(self.axes)}",
        ]
        if self.best.removed:
            lines.append(f"blocks {_numbers(sorted(self.best.removed))} go")
        return "\n".join(lines)


@dataclass(frozen=True)
class SlimReport:
    """What `slim_` did.

    Attributes:
        plan: the plan that was followed.
        parameters: weights in the whole model, before and after.
    """

    # The name of the step on the model card.
    method = "slim"

    plan: SlimPlan
    parameters: tuple[int, int]

    @property
    def options(self) -> dict[str, Any]:
        """What the card tells of it."""
        return self.plan.options

    def to_json(self) -> str:
        """All of it as JSON text."""
        plan = json.loads(self.plan.to_json())
        return json.dumps({"plan": plan, "parameters": self.parameters}, indent=2)

    def summary(self) -> str:
        """The totals in a line."""
        return f"whole model: {self.parameters[1]:,} of {self.parameters[0]:,} weights"

    def __repr__(self) -> str:
        return f"<SlimReport: {self.summary()}, {self.plan!r}>"

    def __str__(self) -> str:
        return f"{self.plan.table()}\n{self.summary()}"


def _row(plan: SlimPlan, choice: SlimChoice, note: str) -> tuple[str, ...]:
    size, blocks = choice.size, str(plan.blocks - len(choice.removed))
    parts = ["", ""] if size is None else [str(size.heads), str(size.neurons)]
    if plan.experts is not None:
        parts = [str(choice.experts)]
    shown = f"{choice.cost:,.0f}" if plan.unit == "weights" else f"{choice.cost:,.2f}"
    return (blocks, *parts, shown, f"{choice.loss:.4f}", note)


def _told(size: BlockSize) -> str:
    return f"{size.heads} heads and {size.neurons} neurons"


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
