"""What packed weights and blocks must hold before machine code reads them."""

from __future__ import annotations


def require(holds: bool, *problem: str) -> None:
    """Raise a ValueError that tells the problem, from the place to the detail, unless it holds."""
    if not holds:
        raise ValueError(
            f"a compiled model is damaged, or was changed by hand: {': '.join(problem)}. Compile it "
            "again."
        )
