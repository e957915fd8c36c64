"""Adapters that several processes train together."""

from __future__ import annotations

from typing import Any


def adapter_configs() -> dict[str, Any]:
    """One of each kind. No seed is given, so that the processes have to agree by themselves."""
    import peft

    layers = ["q_proj", "down_proj"]
    return {
        "lora": peft.LoraConfig(r=4, target_modules=layers, use_rslora=True),
        "shira": peft.ShiraConfig(r=3, target_modules=layers),
    }
