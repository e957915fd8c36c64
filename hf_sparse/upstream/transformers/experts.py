"""What transformers' modules of stacked experts do between their two products."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["gated", "is_spread", "runs_in_autocast"]

# Modules that add tensors of the type of products to those of the type of their inputs, which differ.
_NOT_IN_AUTOCAST = ("DbrxExperts",)


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


def runs_in_autocast(module: nn.Module) -> bool:
    """Whether a module's forward runs where products are of a narrower type than its weights."""
    return not any(type(part).__name__ in _NOT_IN_AUTOCAST for part in module.modules())
