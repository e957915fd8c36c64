"""What transformers does with the weights of a model before it writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["fetched", "under_original_names", "without_ties"]


def fetched(model: PreTrainedModel, name: str) -> Tensor:
    """A weight of a model that `device_map` left on the disk."""
    return load_offloaded_parameter(model, name)


def without_ties(tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a state dict by name, of those that are tied to each other one alone."""
    own: dict[str, Tensor] = remove_tied_weights_from_state_dict(dict(tensors), model)
    return own


def under_original_names(
    model: PreTrainedModel, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a state dict as the checkpoints of the model's family name and divide them."""
    named: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return named
