"""How far a pruned layer's output is from the dense one's."""

from __future__ import annotations

from torch import Tensor


def layer_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """`||X (W - Ŵ)ᵀ||² / ||X Wᵀ||²`: the squared error of a layer's output, relative to the output.

    Args:
        weight: dense, `(out_features, in_features)`.
        pruned: of the same shape.
        gram: of the inputs, `(in_features, in_features)`.
    """
    weight, pruned, gram = weight.double(), pruned.double(), gram.double()
    change = weight - pruned
    lost = (change @ gram * change).sum()
    whole = (weight @ gram * weight).sum()
    return float(lost / whole) if whole > 0 else 0.0
