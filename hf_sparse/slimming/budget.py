"""One budget of a smaller model: weights, megabytes, or milliseconds; checked before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """A budget.

    Attributes:
        name: of the argument: "params", "ms" or "mb".
        value: of it, as it was given.
        unit: "weights", "ms" or "MB".
        share: of what the whole model costs; None: the budget is a number of units.
        number: of units; None: the budget is a share.
    """

    name: str
    value: object
    unit: str
    share: float | None
    number: float | None

    @classmethod
    def of(
        cls, *, params: float | int | None, ms: str | float | None, mb: float | int | None
    ) -> Budget:
        """Read the one budget that is given.

        Raises:
            ValueError: there is none or more than one, or it is no amount.
        """
        given = {"params": params, "ms": ms, "mb": mb}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise ValueError(
                f"the budget is {', '.join(named) or 'missing'}; wanted one of params=0.7 (a share of "
                "the weights, or their number), ms='0.6x' (a share of the time, or milliseconds) and "
                "mb=100."
            )
        [name] = named
        value = given[name]
        unit = {"params": "weights", "ms": "ms", "mb": "MB"}[name]
        is_share = isinstance(value, str) or (name == "params" and isinstance(value, float))
        amount = _amount(value)
        if is_share and isinstance(value, str) and (name != "ms" or not value.endswith("x")):
            amount = math.nan
        if not 0 < amount < (1 if is_share else math.inf):
            wanted = {
                "params": "a share of the weights in (0, 1), such as 0.7, or a whole number of them",
                "ms": "a share of the time in (0, 1), such as '0.6x', or milliseconds > 0",
                "mb": "megabytes > 0",
            }[name]
            raise ValueError(f"{name} is {value!r}; wanted {wanted}.")
        return cls(name, value, unit, amount if is_share else None, None if is_share else amount)

    @property
    def told(self) -> str:
        """The budget as it was given."""
        return f"{self.name}={self.value}"

    def limit(self, whole: float) -> float:
        """The most units that it allows a model to cost that costs `whole` now."""
        return whole * self.share if self.share is not None else float(self.number or 0)

    def nearest(self, least: float, whole: float) -> str:
        """A budget that can just be kept, as it would be given."""
        if self.share is None:
            digits = 0 if self.unit == "weights" else 2
            scale = 10**digits
            return f"{self.name}={math.ceil(least * scale) / scale:.{digits}f}"
        share = math.ceil(least / whole * 1000) / 1000
        return f"{self.name}='{share:.3f}x'" if self.name == "ms" else f"{self.name}={share:.3f}"


def _amount(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return math.nan
    try:
        return float(value.removesuffix("x")) if isinstance(value, str) else float(value)
    except ValueError:
        return math.nan
