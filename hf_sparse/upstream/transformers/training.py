"""What transformers knows of the training that runs."""

from __future__ import annotations

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

__all__ = ["is_deepspeed_zero3_enabled"]
