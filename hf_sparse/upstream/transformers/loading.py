"""How transformers lets others restore the weights of a checkpoint while it loads them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "QuantizationConfigMixin",
    "Restorer",
    "WeightConverter",
    "conversion_from_parts",
    "convert_alike_",
    "detach_",
    "number_of_conversions",
    "quantization_config_class",
    "register_quantization_config",
    "register_quantizer",
    "without_conversions",
]
# The weight of this name in this model, from its parts by the patterns of their names.
Restore = Callable[[str, dict[str, Tensor], "PreTrainedModel"], Tensor]


class Restorer(HfQuantizer):
    """What transformers calls for weights that are not stored as they are used: its quantizers."""

    requires_calibration = True

    def before_loading(
        self, model: PreTrainedModel, files: Sequence[Path], dtype: torch.dtype
    ) -> None:
        """Called once, with the model on the meta device and the files of the checkpoint."""
        raise NotImplementedError

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> None:
        self.before_loading(model, [Path(file) for file in checkpoint_files or []], dtype)


def conversion_from_parts(
    name: str, patterns: Sequence[str], restorer: Restorer, restore: Restore
) -> WeightConverter:
    """The conversion of all weights of a name, each from the parts whose names match the patterns.

    Args:
        name: the last part of a weight's own, such as `weight`.
        patterns: for the end of a name, after that of the module: the first is a whole weight's.
        restorer: of the checkpoint.
        restore: makes a weight.
    """
    return _FromParts(list(patterns), name, [_Restore(restorer, restore)])


def quantization_config_class(method: str) -> Any:
    """The class of the settings of a quantization method; None if transformers does not know it."""
    return AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)


def number_of_conversions(model: PreTrainedModel) -> int:
    """How many conversions transformers has for dense checkpoints of a model, old ones not counted."""
    return len(get_model_conversion_mapping(model, add_legacy=False))


def without_conversions(conversions: list[Any], count: int) -> list[Any]:
    """The conversions of a load without the `count` that are the model's own.

    Those that the caller gave come before them, those of old checkpoints behind.
    """
    end = len(conversions) - len(get_checkpoint_conversion_mapping("legacy") or ())
    return conversions[: end - count] + conversions[end:]


def convert_alike_(name: str, other: str) -> None:
    """Load dense checkpoints into the class called `name` as into the class called `other`."""
    conversions = get_checkpoint_conversion_mapping(other)
    if conversions is not None:
        register_checkpoint_conversion_mapping(name, conversions, overwrite=True)


def detach_(restorer: Restorer, model: PreTrainedModel) -> None:
    """Leave no trace of a restorer on a loaded model.

    Saving dense then reverts the family's own conversions, as of a model that is new.
    """
    restorer.remove_quantization_config(model)
    vars(model).pop("_weight_conversions", None)


class _FromParts(WeightConverter):
    """A converter that is cheap to copy: transformers copies it for every tensor."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _FromParts:
        clone = copy.copy(self)
        clone.collected_tensors = defaultdict(list)
        clone.layer_targets = defaultdict(set)
        return clone


class _Restore(ConversionOps):
    """Makes one weight from its parts."""

    def __init__(self, restorer: Restorer, restore: Restore) -> None:
        # transformers casts the parts of operations without this to the model's dtype before the call.
        self.hf_quantizer = restorer
        self._restore = restore

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        name = kwargs["full_layer_name"]
        parts = {
            pattern: tensors[0] if isinstance(tensors, list) else tensors
            for pattern, tensors in input_dict.items()
        }
        return {name: self._restore(name, parts, kwargs["model"])}
