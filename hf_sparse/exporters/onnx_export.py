"""`export_onnx`: a sparse model as a small ONNX graph that stock programs open."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_sparse.arguments import check_kinds, check_path, check_saves
from hf_sparse.calibration.modes import switched
from hf_sparse.checkpoint.card import CARD_NAME, Card
from hf_sparse.checkpoint.card_file import write_card
from hf_sparse.checkpoint.config_files import dense_config
from hf_sparse.checkpoint.overview import overview
from hf_sparse.checkpoint.save import tensors_to_store
from hf_sparse.checkpoint.source import described, known_metrics, write_entry
from hf_sparse.checkpoint.stored_config import dense_class_name
from hf_sparse.checkpoint.writing import GRAPH_NAME
from hf_sparse.configuration_sparse import HIGHEST_SPARSITY, SparsityConfig
from hf_sparse.exporters.can_export import (
    TOLERANCES,
    check_can_export,
    check_quantization,
    check_weights,
    written_files,
)
from hf_sparse.exporters.codes import EXACT, code_
from hf_sparse.exporters.heads import Head
from hf_sparse.exporters.packing import Packing, pack_
from hf_sparse.exporters.tracing import trace
from hf_sparse.exporters.verification import Difference, compare
from hf_sparse.files.atomic import replacing
from hf_sparse.provenance.values import Metric, Provenance
from hf_sparse.report import SparsityReport, measure_sparsity
from hf_sparse.structure.layers import promised_config
from hf_sparse.structure.parts import full_size
from hf_sparse.structure.targets import Targets
from hf_sparse.structure.units import shrunk_sizes

# How the model is traced: without a cache, and with its usual outputs alone.
_PLAIN: dict[str, Any] = {
    "use_cache": False,
    "output_hidden_states": False,
    "output_attentions": False,
    "return_dict": True,
}


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
        codes: how many weights are stored as codes of which type.
    """

    folder: Path
    task: str
    bytes: int
    packing: Packing
    difference: Difference
    tolerance: float | None
    codes: dict[str, int] = field(default_factory=dict)

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
        if self.codes:
            told = ", ".join(f"{count} {name}" for name, count in sorted(self.codes.items()))
            packed = f"{told} weights are codes; {packed}"
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

    Weights of a model of few bits are stored as its codes, which ONNX Runtime multiplies with as they
    are (see docs/onnx.md); the comparison is in float32.

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
    check_weights(model)
    check_quantization(quantize, batches)
    _check_tolerance(tolerance)
    provenance = described(model, report, base_model)
    promised = _promised_codes(model, quantize)
    plain = switched(model, training=False, **_PLAIN)
    with plain, replacing(folder, written_files(folder).__contains__) as fresh:
        exported = trace(model, head, quantize, batches)
        program = exported.components["model"].program
        coded = code_(program, model, promised) if promised is not None else Counter[str]()
        packing = pack_(program) if pack else Packing()
        _describe_(exported, model, head)
        if head.caches and (untold := _set_key_heads_(exported.config, model)):
            warnings.warn(untold, stacklevel=2)
        exported.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        difference = compare(model, head, fresh / GRAPH_NAME, EXACT if coded else None)
        if tolerance is None and quantize is None:
            tolerance = TOLERANCES[model.dtype]
        _check_difference(difference, tolerance)
        if not metrics and quantize is None:
            metrics = known_metrics(model, tensors_to_store(model))
        provenance = replace(provenance, metrics=tuple(metrics), weights=None)
        write_entry(fresh, provenance)
        card = _card(model, provenance, packing, _usage(head, quantize))
        if warning := write_card(card, fresh / CARD_NAME, folder / CARD_NAME):
            warnings.warn(warning, stacklevel=2)
        size = sum(path.stat().st_size for path in fresh.glob(f"{GRAPH_NAME}*"))
    return ExportReport(folder, head.task, size, packing, difference, tolerance, dict(coded))


def _promised_codes(model: PreTrainedModel, quantize: str | None) -> SparsityConfig | None:
    """The config whose codes a graph holds; None: its weights are floats, or 8-bit by `quantize`."""
    promised = promised_config(model)
    if promised is None or not (promised.bits or promised.embedding_bits) or quantize is not None:
        return None
    return promised if model.dtype == torch.float32 else None


def _check_tolerance(tolerance: float | None) -> None:
    if tolerance is not None and not (
        isinstance(tolerance, int | float) and 0 <= tolerance < math.inf
    ):
        raise ValueError(f"tolerance is {tolerance!r}; wanted a number >= 0.")


def _check_difference(difference: Difference, tolerance: float | None) -> None:
    if tolerance is not None and difference.relative > tolerance:
        raise ValueError(
            f"the graph differs from the model by {difference.relative:.2e} in output "
            f"{difference.output}; wanted at most {tolerance:.0e}. Nothing was written. Give another "
            "tolerance= if that is what you want."
        )


def _describe_(exported: Any, model: PreTrainedModel, head: Head) -> None:
    """Give a traced model the config, the class name and the settings of generation of its model."""
    exported.config = dense_config(model)
    exported.config.dtype = model.dtype
    exported.generation_config = model.generation_config if head.caches else None
    exported.components["model"].metadata.architecture = dense_class_name(model)


def _card(model: PreTrainedModel, provenance: Provenance, packing: Packing, usage: str) -> Card:
    """The model card of a graph."""
    config = promised_config(model)
    measured = measure_sparsity(model, config)
    if config is None:
        config = SparsityConfig("unstructured", min(measured.sparsity, HIGHEST_SPARSITY))
    zeros = overview(model, Targets.of(model, config), measured, provenance.steps)
    return Card(model, config, zeros, packing.formats, provenance, ("onnx",), usage)


def _set_key_heads_(config: Any, model: PreTrainedModel) -> str | None:
    """Set how many heads of keys a shrunk model's caches have: Optimum makes empty ones by it.

    Returns:
        A warning if the config cannot hold it, since the blocks differ.
    """
    sizes = shrunk_sizes(model)
    if sizes is None:
        return None
    counts = {size.key_heads for size in sizes}
    if len(counts) == 1 and hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = counts.pop()
    elif counts != {full_size(model.config).key_heads}:
        return (
            f"the blocks of this shrunk {type(model).__name__} have {sorted(counts)} heads of keys, "
            "which its config cannot tell: Optimum's generate makes caches of other sizes. The graph "
            "runs in ONNX Runtime and with ExportedModel."
        )
    return None


def _usage(head: Head, quantize: str | None) -> str:
    bits = f" Weights and activations have 8 bits ({quantize})." if quantize else ""
    return (
        "```python\n"
        f"from optimum.onnxruntime import ORTModel{head.reader}\n\n"
        f'model = ORTModel{head.reader}.from_pretrained("REPO_OR_FOLDER")\n'
        "```\n\n"
        f"`{GRAPH_NAME}` also runs in ONNX Runtime alone, and with transformers' `ExportedModel`.{bits}"
    )
