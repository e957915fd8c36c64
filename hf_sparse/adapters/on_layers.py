"""The adapter that `recover_` trains: on all sparse layers of a model, but for experts.

Experts in 3-D parameters are no modules of their own, and adapters that keep zeros do not reach them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_sparse.structure.layers import TargetLayer


def adaptable(layers: Sequence[TargetLayer]) -> list[TargetLayer]:
    """The layers that adapters are for: modules of their own."""
    return [layer for layer in layers if layer.stack is None]


def left_alone(layers: Sequence[TargetLayer]) -> tuple[str, ...]:
    """A sentence for the report if an adapter does not reach all of the layers."""
    experts = len(layers) - len(adaptable(layers))
    if not experts:
        return ()
    return (
        f"{experts} matrices of experts stay as they were: adapters that keep zeros are for Linear and "
        "Conv1D layers. method='finetune' trains the experts too.",
    )


def shira_rank(r: int, layers: Sequence[TargetLayer]) -> int:
    """The default rank of ShiRA, or the largest that the smallest of the layers has weights for."""
    from hf_sparse.adapters.shira import largest_rank

    most, _ = largest_rank((layer.name, layer.parameter.detach()) for layer in adaptable(layers))
    return max(1, min(r, most))


def adapter_on(method: str, r: int, layers: Sequence[TargetLayer], seed: int) -> Any:
    """PEFT's config for an adapter on all sparse layers."""
    from peft import LoraConfig, ShiraConfig

    names = [layer.name for layer in adaptable(layers)]
    if method == "shira":
        return ShiraConfig(r=r, target_modules=names, random_seed=seed)
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules=names)
