"""Whether a model can be exported, and into a folder: refused before any work."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from hf_sparse.arguments import check_has_values, check_model
from hf_sparse.checkpoint.can_save import check_can_write
from hf_sparse.checkpoint.writing import MANIFEST_NAME
from hf_sparse.exporters import QUANTIZATIONS
from hf_sparse.exporters.heads import Head, head_of
from hf_sparse.pruning.oneshot import check_not_compiled
from hf_sparse.structure.layers import check_has_weights
from hf_sparse.upstream.peft_by_name import has_adapters
from hf_sparse.upstream.transformers.exporting import has_exporters
from hf_sparse.upstream.transformers.models import has_own_adapters, quantized_by

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# What a tokenizer and a model that generates put beside the graph.
_BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model"),
    *("chat_template.jinja", "generation_config.json"),
)
# The largest difference to the model, relative to its outputs' size (see `Difference`).
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2}


def check_can_export(model: PreTrainedModel, folder: str | os.PathLike[str]) -> Head:
    """Refuse an export for the kind of model, for its folder, or for want of packages.

    Args:
        model: a model, which may be on the meta device.
        folder: where the graph is to be.

    Returns:
        The model's head.

    Raises:
        ImportError, ValueError, OSError: as `export_onnx`.
    """
    head = _check_kind(model)
    _check_folder(Path(folder))
    check_can_write(folder)
    check_packages()
    return head


def check_packages() -> None:
    """Refuse to begin without the packages that an export needs.

    Raises:
        ImportError: which are missing, and how to install them.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export_onnx needs {', '.join(missing)}: pip install 'hf_sparse[onnx]'")
    if not has_exporters():
        raise ImportError(
            f"export_onnx needs transformers 5.23 or newer, and this is {transformers.__version__}: "
            "pip install 'hf_sparse[onnx]'"
        )


def _check_kind(model: Any) -> Head:
    check_model(model, "export_onnx", PreTrainedModel)
    if has_own_adapters(model) or has_adapters(model):
        raise ValueError(
            "the model has adapters, which are for training. Merge them first: "
            "hf_sparse.merge_adapters_(model), which keeps the zeros."
        )
    check_has_weights(model)
    check_not_compiled(model)
    head = head_of(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"a {type(model).__name__} is an encoder and a decoder; wanted a model of one stack."
        )
    parts = ", and what its other parts read" if len(model.config.sub_configs) > 1 else ""
    if model.main_input_name != "input_ids" or parts:
        raise ValueError(
            f"a {type(model).__name__} takes {model.main_input_name}{parts}; wanted a model of token "
            "ids alone. transformers' own exporter "
            "(transformers.exporters.OnnxExporter) writes other graphs, with their zeros in place."
        )
    text = model.config.get_text_config()
    if not isinstance(getattr(text, "vocab_size", None), int):
        raise ValueError(
            f"the config of this {type(model).__name__} has no vocab_size; wanted a model of token ids "
            "from a vocabulary. transformers' own exporter (transformers.exporters.OnnxExporter) "
            "writes other graphs, with their zeros in place."
        )
    if "dynamic" in _rope_types(text):
        raise ValueError(
            f"this {type(model).__name__} has rope_type 'dynamic', whose frequencies are computed anew "
            "whenever a text is longer than those before: a graph cannot do that. Wanted another "
            "rope_type, such as 'longrope', 'yarn' or 'linear'."
        )
    if (
        head.task == "text-classification"
        and text.pad_token_id is None
        and not getattr(text, "type_vocab_size", 0)
    ):
        raise ValueError(
            f"a {type(model).__name__} needs a padding token to find the last token of each text: set "
            "model.config.pad_token_id."
        )
    return head


def _check_folder(folder: Path) -> None:
    weights = [path.name for path in folder.glob("*.safetensors")] if folder.is_dir() else []
    if weights:
        raise ValueError(
            f"{folder} holds {weights[0]}: a checkpoint, whose config.json the export would replace. "
            "Wanted a folder of its own, such as a folder in it."
        )
    if folder.is_dir() and any(folder.iterdir()) and not written_files(folder):
        raise ValueError(
            f"{folder} holds {next(folder.iterdir()).name} and no {MANIFEST_NAME}: it is no export. "
            "Wanted a new or empty folder, or an earlier export."
        )


def written_files(folder: Path) -> set[str]:
    """The graphs of the export that is in a folder, and what is beside them; none if there is none."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        graphs = [entry["file"] for entry in manifest["components"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {*graphs, *(f"{name}.data" for name in graphs), *_BESIDE}


def check_weights(model: PreTrainedModel) -> None:
    if quantized_by(model) is not None:
        raise ValueError(
            "the model is quantized. Load it without quantization, and give export_onnx quantize="
            "'dynamic' for 8-bit weights."
        )
    check_has_values(model, "export_onnx")
    where = {parameter.device.type for parameter in model.parameters()}
    if where != {"cpu"}:
        raise ValueError(
            f"the model is on {', '.join(sorted(where))}; wanted the CPU: model.to('cpu')."
        )
    if model.dtype not in TOLERANCES:
        raise ValueError(
            f"the model is {model.dtype}, which ONNX Runtime has no CPU kernels for. Wanted float32 or "
            "float16: model.float()."
        )


def check_quantization(quantize: str | None, batches: Any) -> None:
    if quantize not in (None, *QUANTIZATIONS):
        raise ValueError(
            f"quantize is {quantize!r}; wanted None or one of {', '.join(QUANTIZATIONS)}."
        )
    if quantize == "static" and not _has_tokens(batches):
        raise ValueError(
            "static quantization calibrates on data: give batches=hf_sparse.calibration_batches(...), "
            "a list of dicts with input_ids, in which not all is padding."
        )
    if quantize != "static" and batches is not None:
        raise ValueError("batches are for quantize='static' alone; leave them out.")


def _has_tokens(batches: Any) -> bool:
    """Whether these are batches to calibrate on."""
    if not isinstance(batches, Sequence) or not batches:
        return False
    for batch in batches:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            return False
        mask = torch.as_tensor(batch.get("attention_mask", 1))
        if not torch.as_tensor(batch["input_ids"]).numel() or not bool(mask.any()):
            return False
    return True


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary positions that a config names, for all of its layers."""
    given = getattr(config, "rope_parameters", None) or {}
    entries = [given, *(entry for entry in given.values() if isinstance(entry, dict))]
    return {str(entry["rope_type"]) for entry in entries if entry.get("rope_type")}
