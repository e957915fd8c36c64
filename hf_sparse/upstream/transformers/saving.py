"""What transformers does with the weights of a model before it writes them."""

from __future__ import annotations

from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict

__all__ = [
    "load_offloaded_parameter",
    "remove_tied_weights_from_state_dict",
    "revert_weight_conversion",
]
