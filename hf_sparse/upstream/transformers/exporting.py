"""transformers' exporters, which it has since 5.23: they are imported when they are used."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.exporters.base import ExportedModel as ExportedModel

__all__ = ["dynamic_axes", "dynamic_quantizer", "export", "has_exporters", "static_quantizer"]

_SYMMETRIC = {"WeightSymmetric": True}


def has_exporters() -> bool:
    """Whether this transformers writes ONNX graphs with the metadata that its readers need."""
    return all(
        importlib.util.find_spec(f"transformers.exporters{module}") is not None
        for module in ("", ".metadata")
    )


def export(
    model: PreTrainedModel, inputs: dict[str, Any], axes: dict[str, Any], quantizer: Any
) -> ExportedModel:
    """The model as an ONNX graph, traced on some inputs.

    Args:
        model: in eval mode.
        inputs: of its forward, by name.
        axes: of the inputs that vary, as from `dynamic_axes`.
        quantizer: one of those below, or None.
    """
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    settings = OnnxConfig(dynamic=True, dynamic_shapes=axes, quantizer=quantizer)
    return OnnxExporter().export(model, inputs, settings)


def dynamic_axes(inputs: dict[str, Any]) -> dict[str, Any]:
    """For each input, by name, its axes, all of which vary; for a cache, those of its tensors."""
    from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes

    axes: dict[str, Any] = get_auto_dynamic_shapes(inputs)
    return axes


def dynamic_quantizer() -> Any:
    """Weights in 8 bits, one scale for each channel; activations are quantized as they come."""
    from transformers.exporters.quantizers.quantizer_onnxruntime import (
        OnnxRuntimeDynamicConfig,
        OnnxRuntimeQuantizer,
    )

    settings = OnnxRuntimeDynamicConfig(per_channel=True, extra_options=_SYMMETRIC)
    return OnnxRuntimeQuantizer(settings)


def static_quantizer(samples: Sequence[dict[str, Any]], operators: Sequence[str]) -> Any:
    """Weights and activations in 8 bits, whose ranges are measured on samples.

    Args:
        samples: inputs of the graph.
        operators: the names of the ONNX operators that are quantized.
    """
    from transformers.exporters.quantizers.quantizer_onnxruntime import (
        OnnxRuntimeQuantizer,
        OnnxRuntimeStaticConfig,
    )

    settings = OnnxRuntimeStaticConfig(
        per_channel=True, op_types_to_quantize=list(operators), extra_options=_SYMMETRIC
    )
    return OnnxRuntimeQuantizer(settings, calibration_dataset=list(samples))
