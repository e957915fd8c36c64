"""How a dense checkpoint is loaded to be pruned: by which class, and with floats for codes."""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from hf_sparse.checkpoint.model_classes import model_class_named
from hf_sparse.upstream.transformers.loading import quantization_config_class


def dense_model_class(source: str, config: PreTrainedConfig | None = None) -> Any:
    """The class that `architectures` of a dense checkpoint's config names.

    Args:
        source: folder or Hub name.
        config: of it, if it is known already.

    Raises:
        ValueError: it names none, or one that transformers does not have.
    """
    config = AutoConfig.from_pretrained(source) if config is None else config
    name = (config.architectures or [""])[0]
    model_class = model_class_named(name, type(config))
    if model_class is None:
        raise ValueError(
            f"{source}: config.json names the class {name!r}, which is not in transformers "
            f"{transformers.__version__}. Save the model again with a current version."
        )
    return model_class


def restored(source: str, config: PreTrainedConfig) -> dict[str, Any]:
    """The arguments of `from_pretrained` with which quantized weights become floats.

    Args:
        source: folder or Hub name.
        config: of it.

    Raises:
        ValueError: it is quantized by a method that transformers cannot undo while it loads.
    """
    section = getattr(config, "quantization_config", None)
    if not isinstance(section, dict) or section.get("quant_method") == "hf_sparse":
        return {}
    name = str(section.get("quant_method"))
    kind: Any = quantization_config_class(name)
    if kind is None or "dequantize" not in inspect.signature(kind.__init__).parameters:
        raise ValueError(
            f"{source} is quantized with {name}, and zeros are stored as floats. Load it, call "
            "model.dequantize(), save it, and prune that; or take the model that it was made from."
        )
    method = kind.from_dict(section)
    method.dequantize = True
    return {"quantization_config": method}
