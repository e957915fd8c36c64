"""Names of files, and where files of the Hub are on this machine."""

from __future__ import annotations

from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

__all__ = ["ADAPTER_CONFIG_NAME", "cached_file"]
