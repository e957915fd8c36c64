"""Names of other packages that are no public API of theirs, and that hf_sparse relies on.

One line each: when a new release renames one, the test that fails tells which and who uses it.
"""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

# (package.module, the name in it, who uses it)
RELIED_ON = [
    ("transformers.core_model_loading", "ConversionOps.convert", "checkpoint.quantizer"),
    ("transformers.core_model_loading", "WeightConverter.add_tensor", "checkpoint.quantizer"),
    ("transformers.core_model_loading", "revert_weight_conversion", "checkpoint.stored_parts"),
    ("transformers.integrations.accelerate", "load_offloaded_parameter", "checkpoint.implied"),
    ("transformers.modeling_utils", "remove_tied_weights_from_state_dict", "checkpoint.save"),
    ("transformers.modeling_utils", "PreTrainedModel._get_dtype_plan", "checkpoint.quantizer"),
    ("transformers.modeling_utils", "PreTrainedModel._keys_to_ignore_on_save", "checkpoint.save"),
    (
        "transformers.modeling_utils",
        "PreTrainedModel._keys_to_ignore_on_load_missing",
        "checkpoint.promised",
    ),
    ("transformers.modeling_utils", "PreTrainedModel._from_config", "checkpoint.legacy"),
    (
        "transformers.quantizers.base",
        "HfQuantizer.remove_quantization_config",
        "checkpoint.quantizer",
    ),
    ("transformers.quantizers.base", "HfQuantizer.get_weight_conversions", "checkpoint.quantizer"),
    (
        "transformers.quantizers.base",
        "HfQuantizer.update_weight_conversions",
        "checkpoint.quantizer",
    ),
    ("transformers.conversion_mapping", "get_model_conversion_mapping", "checkpoint.quantizer"),
    (
        "transformers.conversion_mapping",
        "get_checkpoint_conversion_mapping",
        "checkpoint.quantizer",
    ),
    (
        "transformers.conversion_mapping",
        "register_checkpoint_conversion_mapping",
        "models.modeling",
    ),
    ("transformers", "CONFIG_MAPPING._extra_content", "models.configuration"),
    ("transformers", "PreTrainedConfig._decode_special_floats", "checkpoint.described"),
    ("transformers.models.auto.configuration_auto", "CONFIG_MAPPING_NAMES", "models"),
    ("transformers.models.auto", "AutoModel._model_mapping", "models.modeling"),
    ("transformers.models.auto", "AutoModel._model_mapping", "checkpoint.model_classes"),
    (
        "torch.nn.modules.module",
        "register_module_parameter_registration_hook",
        "checkpoint.described",
    ),
    ("transformers.models.auto.tokenization_auto", "TOKENIZER_MAPPING", "models.modeling"),
    ("transformers.masking_utils", "AttentionMaskInterface.register", "runtime.model.compiled"),
    ("transformers.cache_utils", "CacheLayerMixin", "runtime.programs.cache"),
    ("transformers.cache_utils", "DynamicLayer", "runtime.programs.cache"),
    ("transformers.quantizers.auto", "AUTO_QUANTIZATION_CONFIG_MAPPING", "pruning.loading"),
    ("torch.optim.adamw", "adamw", "optim.movement"),
    ("torch.utils._pytree", "tree_flatten", "calibration.recording"),
    ("torch.utils._pytree", "tree_unflatten", "calibration.recording"),
    ("re", "_parser.parse", "adapters.expressions"),
]
# Names that we do not write: the methods of classes that ours are made from.
INHERITED = {"add_tensor": "WeightConverter", "resolve_lora_variant": "LoraVariant"}
OPTIONAL = [
    ("transformers.exporters.configs", "OnnxConfig", "exporters.tracing"),
    ("transformers.exporters.exporter_onnx", "OnnxExporter", "exporters.tracing"),
    ("transformers.exporters.exporter_dynamo", "get_auto_dynamic_shapes", "exporters.tracing"),
    ("peft.tuners.lora.layer", "LoraLayer.resolve_lora_variant", "adapters.masked_lora"),
    ("peft.tuners.tuners_utils", "check_target_module_exists", "adapters.checks"),
]


@pytest.mark.parametrize(("module", "name", "user"), RELIED_ON + OPTIONAL)
def test_a_name_that_we_rely_on_is_there(module: str, name: str, user: str) -> None:
    value = pytest.importorskip(module)
    for part in name.split("."):
        assert hasattr(value, part), f"{module}.{name} is gone: hf_sparse.{user} needs another way"
        value = getattr(value, part)


@pytest.mark.parametrize(("module", "name", "user"), RELIED_ON + OPTIONAL)
def test_who_uses_a_name_is_told_truly(module: str, name: str, user: str) -> None:
    used = importlib.util.find_spec(f"hf_sparse.{user}")
    assert used is not None, f"hf_sparse.{user} is no module"
    own = name.rpartition(".")[2]
    told = Path(str(used.origin)).read_text()
    assert own in told or INHERITED.get(own, own) in told


def test_conversions_are_called_with_the_names_that_ours_reads() -> None:
    convert = importlib.import_module("transformers.core_model_loading").WeightConverter.convert
    source = inspect.getsource(convert)
    assert "full_layer_name=" in source
    assert "model=" in source


def test_families_tell_the_class_of_their_blocks() -> None:
    from transformers import BertModel, LlamaModel

    for model_class in (BertModel, LlamaModel):
        assert "hidden_states" in model_class._can_record_outputs  # runtime.model.compiled


@pytest.mark.skipif(
    not getattr(torch._C, "_has_mkldnn", False), reason="torch was built without oneDNN"
)
def test_onednn_tells_whether_it_computes_in_bfloat16() -> None:
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)
    assert hasattr(torch.ops.mkldnn, "_linear_pointwise")
