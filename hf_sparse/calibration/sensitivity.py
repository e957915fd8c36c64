"""How much each layer of a model does to its output: input norms, and the error when it is pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.calibration.calling import run_on
from hf_sparse.calibration.input_statistics import Norms
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.recording import token_masks
from hf_sparse.calibration.walk import run_model
from hf_sparse.patterns import Pattern
from hf_sparse.structure.layers import TargetLayer

# The sparsity at which a layer's effect on the model's output is measured.
PROBE = 0.75
_TINY = 1e-30


def input_norms(
    model: nn.Module, layers: Sequence[TargetLayer], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The root of the summed squares of each layer's inputs, `(in_features,)`, without padding."""
    norms = Norms()
    with torch.no_grad(), switched(model, training=False), norms.collecting(layers):
        run_model(model, batches, norms)
    return {layer.name: seen.statistic.float() for seen in norms.groups() for layer in seen.layers}


def sensitivities(
    model: nn.Module,
    layers: Sequence[TargetLayer],
    scores: Mapping[str, Tensor],
    batches: Sequence[Mapping[str, Tensor]],
) -> dict[str, float]:
    """What the share of its output's energy that one layer loses does to the model's output.

    Outputs of padding count nowhere. The weights are changed for a while, one layer at a time, and put
    back.
    """
    pattern = Pattern.parse("unstructured")
    kept = {layer.name: pattern.keep(scores[layer.name], PROBE) for layer in layers}
    changes = output_changes(model, layers, lambda one: one.weight * kept[one.name], batches)
    return {
        name: change / max(lost_energy(scores[name], kept[name]), _TINY)
        for name, change in changes.items()
    }


@torch.no_grad()
def output_changes(
    model: nn.Module,
    layers: Sequence[TargetLayer],
    changed: Callable[[TargetLayer], Tensor],
    batches: Sequence[Mapping[str, Tensor]],
) -> dict[str, float]:
    """How far the model's output moves, in squares and relative, when one layer alone is changed.

    Args:
        model: its weights are changed for a while, one layer at a time, and put back.
        layers: of the model.
        changed: gives the weight of a layer, `(out_features, in_features)`, that is tried.
        batches: inputs; outputs of padding count nowhere.
    """
    wanted = _outputs(model, batches)
    size = sum(float(output.square().sum()) for output in wanted)
    found = {}
    for layer in layers:
        before = layer.weight.clone()
        try:
            layer.weight.copy_(changed(layer))
            outputs = _outputs(model, batches)
        finally:
            layer.weight.copy_(before)
        pairs = zip(outputs, wanted, strict=True)
        error = sum(float((a - b).square().sum()) for a, b in pairs)
        found[layer.name] = error / max(size, _TINY)
    return found


def _outputs(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """The first output of each batch, hidden states or logits, where it has a token that counts."""
    with torch.no_grad(), switched(model, training=False):
        return [token_masks(batch).counted(_first(run_on(model, batch))) for batch in batches]


def _first(outputs: Any) -> Tensor:
    """The first output `(..., features)`, fp32; of where an answer starts and ends, both."""
    if getattr(outputs, "start_logits", None) is not None:
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1).float()
    first: Tensor = outputs[0].float()
    return first


def lost_energy(scores: Tensor, kept: Tensor) -> float:
    """The share of the energy that is not kept."""
    energy = scores.square().sum().clamp_min(_TINY)
    return float(1 - scores[kept].square().sum() / energy)
