"""Of every mixture of experts that transformers has, nearly all weights in matrices are targets."""

from __future__ import annotations

import pytest
import torch

from hf_sparse.structure.layers import block_layers
from tests.support.any_models import classes_of, model_types, tiny_config
from tests.support.block_matrices import is_mixture, share_of_targets

# Matrices that mix the residual's streams (hyper-connections): small in a model of real size.
_STREAMS = ("deepseek_v4", "hy_v4", "hy_v4_vl", "hy_v4_vl_text")
_EXPERTS = ("experts.", "shared_experts", "moe")


def targets_in(model_type: str) -> tuple[float, list[str], int]:
    """The share of targets, what is left out, and how many targets are of experts."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        model = classes_of(config)[0]._from_config(config)
    share, missing = share_of_targets(model)
    names = [layer.name for layer in block_layers(model)]
    return share, missing, sum(any(part in name for part in _EXPERTS) for name in names)


@pytest.mark.parametrize(
    "model_type", ["dbrx", "inkling_text", "jetmoe", "llama4_text", "longcat_flash", "nllb-moe"]
)
def test_all_matrices_of_a_mixture_are_targets(model_type: str) -> None:
    share, missing, experts = targets_in(model_type)
    assert share >= 0.98, missing
    assert experts > 0


@pytest.mark.slow
def test_every_mixture_has_at_least_98_percent_of_its_matrices_as_targets() -> None:
    found, below, without = {}, {}, []
    for model_type in filter(is_mixture, model_types()):
        try:
            found[model_type], missing, experts = targets_in(model_type)
        except ValueError as error:
            print(f"{model_type}: not built: {error}")
            continue
        if found[model_type] < 0.98:
            below[model_type] = missing
        if not experts:
            without.append(model_type)
    print(f"{len(found)} types; below: {below}; without experts: {without}")
    assert len(found) >= 80
    assert below.keys() <= set(_STREAMS)
    assert all(name.endswith("_hc.fn") for missing in below.values() for name in missing)
