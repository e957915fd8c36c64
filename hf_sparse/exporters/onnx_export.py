"""`export_onnx`: a sparse model as a small ONNX graph that stock programs open."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from hf_sparse.arguments import check_has_values, check_kinds, check_model, check_path, check_saves
from hf_sparse.calibration.modes import switched
from hf_sparse.checkpoint.can_save import check_can_write
from hf_sparse.checkpoint.card import CARD_NAME, Card, write_card
from hf_sparse.checkpoint.config_files import dense_config
from hf_sparse.checkpoint.overview import overview
from hf_sparse.checkpoint.save import tensors_to_store
from hf_sparse.checkpoint.source import described, known_metrics, write_entry
from hf_sparse.checkpoint.stored_config import dense_class_name
from hf_sparse.checkpoint.writing import GRAPH_NAME, MANIFEST_NAME
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.exporters import QUANTIZATIONS
from hf_sparse.exporters.heads import Head, head_of
from hf_sparse.exporters.packing import Packing, pack_
from hf_sparse.exporters.tracing import trace
from hf_sparse.exporters.verification import Difference, compare
from hf_sparse.files.atomic import replacing
from hf_sparse.provenance.values import Metric
from hf_sparse.pruning.oneshot import check_not_compiled
from hf_sparse.report import SparsityReport, measure_sparsity
from hf_sparse.structure.layers import check_has_weights, has_adapters, promised_config
from hf_sparse.structure.parts import full_size
from hf_sparse.structure.targets import Targets
from hf_sparse.structure.units import shrunk_sizes

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# What a tokenizer and a model that generates put beside the graph.
_BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model"),
    *("chat_template.jinja", "generation_config.json"),
)
# How the model is traced: without a cache, and with its usual outputs alone.
_PLAIN: dict[str, Any] = {
    "use_cache": False,
    "output_hidden_states": False,
    "output_attentions": False,
    "return_dict": True,
}
# The largest difference to the model, relative to its outputs' size (see `Difference`).
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2}


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        folder: where.
        task: the head's name on the Hub.
        bytes: of the graph and its weights.
        packing: the weights that are packed in the graph.
        difference: between ONNX Runtime and torch.
        tolerance: what was allowed; None for quantized graphs.
    """

    folder: Path
    task: str
    bytes: int
    packing: Packing
    difference: Difference
    tolerance: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "folder": str(self.folder)}

    def __repr__(self) -> str:
        return (
            f"<ExportReport: {self.task} in {str(self.folder)!r}, {self.bytes / 1e6:.1f} MB, "
            f"{sum(self.packing.formats.values())} weights packed, differs from torch by "
            f"{self.difference.absolute:.1e}; print it for more>"
        )

    def __str__(self) -> str:
        packing = self.packing
        formats = ", ".join(f"{count} {name}" for name, count in sorted(packing.formats.items()))
        packed = (
            f"{sum(packing.formats.values())} weights packed ({formats}): "
            f"{packing.packed_bytes / 1e6:.1f} MB instead of {packing.dense_bytes / 1e6:.1f}, "
            f"{packing.packed_bytes / packing.bound_bytes:.2f}x of nonzeros and 1 bit per weight"
            if packing.formats
            else "no weight is smaller packed"
        )
        return (
            f"{self.folder}: {self.task}, {self.bytes / 1e6:.1f} MB; {packed}; ONNX Runtime and torch "
            f"differ by {self.difference.absolute:.1e} at most ({self.difference.output})"
        )


def export_onnx(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    pack: bool = True,
    quantize: str | None = None,
    batches: Sequence[dict[str, Any]] | None = None,
    report: SparsityReport | None = None,
    metrics: Sequence[Metric] = (),
    base_model: str | None = None,
    tolerance: float | None = None,
) -> ExportReport:
    """Export a model as an ONNX graph whose zeros take no space.

    The folder opens with ONNX Runtime alone, with Optimum's `ORTModelFor....from_pretrained`, and
    with transformers' `ExportedModel.from_pretrained`. Weights are packed as nonzeros and their
    places and rebuilt by standard operators, which ONNX Runtime folds while it loads. Batch and
    length are dynamic; causal models take and give keys and values. Before the folder is put in
    place the graph is run in ONNX Runtime on several sizes and compared with the model.

    Args:
        model: a transformers model in fp32 or fp16 on the CPU, with a head of `HEADS`; Sparse or not.
        folder: new, empty, or an earlier export, which is replaced.
        tokenizer: saved beside the graph if given.
        pack: store the weights that have enough zeros packed.
        quantize: `"dynamic"` or `"static"`: 8-bit weights and activations by ONNX Runtime's own
            quantizer, symmetric, so that zeros stay zeros.
        batches: inputs that `"static"` calibrates on.
        report: the `prune_` report, for the method on the model card, if the model was not pruned
            here or loaded with a card that tells it.
        metrics: measured figures for the model card. Without them those of the checkpoint that the
            model was loaded from are told, if its weights are still the same and not quantized.
        base_model: Hub name of the dense model, for the card.
        tolerance: the largest difference allowed, relative to the outputs' size. None: 1e-4 in
            fp32, 2e-2 in fp16; quantized graphs are only reported.

    Returns:
        Sizes and differences.

    Memory: about three times the model.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: a model that cannot be exported, a folder that holds something else, or a graph
            that differs from the model. The folder is untouched then.
        OSError: the disk is full, or the folder cannot be written; likewise.
    """
    check_path(folder, "export_onnx")
    folder = Path(folder)
    head = check_can_export(model, folder)
    check_kinds(export_onnx, locals())
    check_saves(tokenizer, "export_onnx")
    _check_weights(model)
    _check_quantization(quantize, batches)
    if tolerance is not None and not (
        isinstance(tolerance, int | float) and 0 <= tolerance < math.inf
    ):
        raise ValueError(f"tolerance is {tolerance!r}; wanted a number >= 0.")
    known = described(model, report, base_model)
    plain = switched(model, training=False, **_PLAIN)
    with plain, replacing(folder, written_files(folder).__contains__) as fresh:
        exported = trace(model, head, quantize, batches)
        component = exported.components["model"]
        packing = pack_(component.program) if pack else Packing()
        exported.config = dense_config(model)
        if head.caches:
            _tell_key_heads(exported.config, model)
        exported.config.dtype = model.dtype
        exported.generation_config = model.generation_config if head.caches else None
        component.metadata.architecture = dense_class_name(model)
        exported.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        difference = compare(model, head, fresh / GRAPH_NAME)
        allowed = tolerance
        if allowed is None and quantize is None:
            allowed = TOLERANCES[model.dtype]
        if allowed is not None and difference.relative > allowed:
            raise ValueError(
                f"the graph differs from the model by {difference.relative:.2e} in output "
                f"{difference.output}; wanted at most {allowed:.0e}. Nothing was written. Give another "
                "tolerance= if that is what you want."
            )
        config = promised_config(model)
        measured = measure_sparsity(model, config)
        if config is None:
            config = SparsityConfig("unstructured", min(measured.sparsity, 0.999999))
        if not metrics and quantize is None:
            metrics = known_metrics(model, tensors_to_store(model))
        known = replace(known, metrics=tuple(metrics), weights=None)
        write_entry(fresh, known)
        usage = _usage(head, quantize)
        found = overview(model, Targets.of(model, config), measured, known.steps)
        card = Card(model, config, found, packing.formats, known, ("onnx",), usage)
        write_card(card, fresh / CARD_NAME, folder / CARD_NAME)
        size = sum(path.stat().st_size for path in fresh.glob(f"{GRAPH_NAME}*"))
    return ExportReport(folder, head.task, size, packing, difference, allowed)


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
    exporters = importlib.util.find_spec("transformers.exporters")
    if exporters is None or importlib.util.find_spec("transformers.exporters.metadata") is None:
        raise ImportError(
            f"export_onnx needs transformers 5.23 or newer, and this is {transformers.__version__}: "
            "pip install 'hf_sparse[onnx]'"
        )


def _check_kind(model: Any) -> Head:
    check_model(model, "export_onnx", PreTrainedModel)
    if getattr(model, "_hf_peft_config_loaded", False) or has_adapters(model):
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


def _check_weights(model: PreTrainedModel) -> None:
    if getattr(model, "hf_quantizer", None) is not None:
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


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary positions that a config names, for all of its layers."""
    given = getattr(config, "rope_parameters", None) or {}
    entries = [given, *(entry for entry in given.values() if isinstance(entry, dict))]
    return {str(entry["rope_type"]) for entry in entries if entry.get("rope_type")}


def _check_quantization(quantize: str | None, batches: Any) -> None:
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


def _tell_key_heads(config: Any, model: PreTrainedModel) -> None:
    """Write how many heads of keys a shrunk model's caches have: Optimum makes empty ones by it."""
    sizes = shrunk_sizes(model)
    if sizes is None:
        return
    counts = {size.key_heads for size in sizes}
    if len(counts) == 1 and hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = counts.pop()
    elif counts != {full_size(model.config).key_heads}:
        warnings.warn(
            f"the blocks of this shrunk {type(model).__name__} have {sorted(counts)} heads of keys, "
            "which its config cannot tell: Optimum's generate makes caches of other sizes. The graph "
            "runs in ONNX Runtime and with ExportedModel.",
            stacklevel=3,
        )


def _usage(head: Head, quantize: str | None) -> str:
    bits = f" Weights and activations have 8 bits ({quantize})." if quantize else ""
    return (
        "```python\n"
        f"from optimum.onnxruntime import ORTModel{head.reader}\n\n"
        f'model = ORTModel{head.reader}.from_pretrained("REPO_OR_FOLDER")\n'
        "```\n\n"
        f"`{GRAPH_NAME}` also runs in ONNX Runtime alone, and with transformers' `ExportedModel`.{bits}"
    )
