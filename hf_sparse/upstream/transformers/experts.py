"""What transformers' modules of stacked experts do between their two products."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["gated", "is_spread"]


def is_spread(module: Any) -> bool:
    """Whether this process has a part of the experts of a module alone."""
    return bool(getattr(module, "_is_expert_parallel", False))


def gated(module: Any, both: Tensor) -> Tensor:
    """What enters an expert's last product: its gate, behind the activation, times the rest.

    Args:
        module: of experts that have gates.
        both: the outputs of the first product, `(tokens, 2 * intermediate)`.
    """
    if hasattr(module, "_apply_gate"):
        own: Tensor = module._apply_gate(both)
        return own
    gate, up = both.chunk(2, dim=-1)
    result: Tensor = module.act_fn(gate) * up
    return result
