"""`export_onnx`: a sparse model as a small ONNX graph that stock programs open."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from hf_sparse.checkpoint.atomic import replacing
from hf_sparse.checkpoint.card import CARD_NAME, Card, Metric
from hf_sparse.checkpoint.config_files import dense_class_name, dense_config
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.exporters import QUANTIZATIONS
from hf_sparse.exporters.heads import Case, Head, example, head_of
from hf_sparse.exporters.packing import Packing, pack_
from hf_sparse.exporters.verification import Difference, compare
from hf_sparse.models.parts import full_size
from hf_sparse.pruning.oneshot import check_not_compiled, quiet
from hf_sparse.report import SparsityReport, measure_sparsity
from hf_sparse.structure import promised_config
from hf_sparse.units import shrunk_sizes

if TYPE_CHECKING:
    import onnx_ir
    from transformers.exporters.base import ExportedModel

GRAPH_NAME = "model.onnx"
_MANIFEST_NAME = "export.json"  # of transformers' ExportedModel
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# What static quantization touches: softmax and norms in 8 bits cost too much accuracy.
_PRODUCTS = ("MatMul", "Gemm", "Gather")
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
        report: the `prune_` report, for the method on the model card.
        metrics: measured figures for the model card.
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
    folder = Path(folder)
    _check_packages()
    head = _check_model(model)
    _check_quantization(quantize, batches)
    _check_folder(folder)
    with quiet(model), replacing(folder, _is_stale) as fresh:
        exported = _traced(model, head, quantize, batches)
        component = exported.components["model"]
        if head.caches:
            _rename_caches(component.program.graph)
        _name_axes(component.program.graph, head)
        _forget_sources(component.program.graph)
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
        facts = (report, metrics, ("onnx",), base_model, _usage(head))
        card = Card(model, config, measured, packing.formats, *facts)
        card.write(fresh / CARD_NAME, folder / CARD_NAME)
        size = sum(path.stat().st_size for path in fresh.glob(f"{GRAPH_NAME}*"))
    return ExportReport(folder, head.task, size, packing, difference, allowed)


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export_onnx needs {', '.join(missing)}: pip install 'hf_sparse[onnx]'")


def _check_model(model: Any) -> Head:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a {type(model).__name__} cannot be exported; wanted a PreTrainedModel of transformers. "
            "Merge the adapters of a PEFT model first: hf_sparse.merge_adapters(model). Of another "
            "wrapper, export the model inside."
        )
    if getattr(model, "_hf_peft_config_loaded", False) or _has_adapters(model):
        raise ValueError(
            "the model has adapters, which are for training. Merge them first: "
            "hf_sparse.merge_adapters(model), which keeps the zeros."
        )
    check_not_compiled(model)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "the model is quantized. Load it without quantization, and give export_onnx quantize="
            "'dynamic' for 8-bit weights."
        )
    head = head_of(model)
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
    text = model.config.get_text_config()
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


def _has_adapters(model: PreTrainedModel) -> bool:
    return any(type(module).__module__.startswith("peft.") for module in model.modules())


def _check_quantization(quantize: str | None, batches: Any) -> None:
    if quantize not in (None, *QUANTIZATIONS):
        raise ValueError(
            f"quantize is {quantize!r}; wanted None or one of {', '.join(QUANTIZATIONS)}."
        )
    if quantize == "static" and not batches:
        raise ValueError(
            "static quantization calibrates on data: give batches=hf_sparse.calibration_batches(...)."
        )
    if quantize != "static" and batches is not None:
        raise ValueError("batches are for quantize='static' alone; leave them out.")


def _check_folder(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MANIFEST_NAME).exists():
        raise ValueError(
            f"{folder} holds {next(folder.iterdir()).name} and no {_MANIFEST_NAME}: it is no export. "
            "Wanted a new or empty folder, or an earlier export."
        )


def _is_stale(name: str) -> bool:
    return name.endswith((".onnx", ".onnx.data"))


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """torch.onnx, transformers' exporters and ONNX Runtime's quantizer print remarks on themselves."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _traced(
    model: PreTrainedModel, head: Head, quantize: str | None, batches: Any
) -> ExportedModel:
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter
    from transformers.exporters.quantizers.quantizer_onnxruntime import (
        OnnxRuntimeDynamicConfig,
        OnnxRuntimeQuantizer,
        OnnxRuntimeStaticConfig,
    )

    given = example(model, head, Case(2, 5, past=4 if head.caches else 0)).inputs
    symmetric = {"WeightSymmetric": True}
    quantizer = None
    if quantize == "dynamic":
        dynamic = OnnxRuntimeDynamicConfig(per_channel=True, extra_options=symmetric)
        quantizer = OnnxRuntimeQuantizer(dynamic)
    elif quantize == "static":
        if head.caches:
            raise ValueError(
                "static quantization of a model with a cache is not supported: use 'dynamic'."
            )
        static = OnnxRuntimeStaticConfig(
            per_channel=True, op_types_to_quantize=list(_PRODUCTS), extra_options=symmetric
        )
        samples = [_completed(batch, given) for batch in batches]
        quantizer = OnnxRuntimeQuantizer(static, calibration_dataset=samples)
    settings = OnnxConfig(dynamic=True, dynamic_shapes=_dynamic_axes(given), quantizer=quantizer)
    with _silenced():
        return OnnxExporter().export(model, given, settings)


def _completed(batch: dict[str, Any], traced: dict[str, Any]) -> dict[str, Any]:
    """A batch with all inputs of the graph: no padding and one segment where it tells of none."""
    ids = torch.as_tensor(batch["input_ids"])
    usual = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return {name: torch.as_tensor({**usual, **batch}[name]) for name in traced}


def _dynamic_axes(inputs: dict[str, Any]) -> dict[str, Any]:
    """Which axes vary: all of token ids and masks, batch and tokens of keys and values."""
    from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes

    tensors = {name: value for name, value in inputs.items() if name != "use_cache"}
    axes: dict[str, Any] = get_auto_dynamic_shapes(tensors)
    if "past_key_values" in axes:
        axes["past_key_values"] = [
            {axis: size for axis, size in leaf.items() if axis in (0, 2)}
            for leaf in axes["past_key_values"]
        ]
    return axes


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


def _rename_caches(graph: onnx_ir.Graph) -> None:
    """Name keys and values as Optimum does: `past_key_values.0.key` and `present.0.key`."""
    for values, start in ((graph.inputs, "past_key_values"), (graph.outputs, "present")):
        for value in values:
            found = re.fullmatch(
                r".*past_key_values\.layers\.(\d+)\.(key|value)s", value.name or ""
            )
            if found:
                value.name = f"{start}.{found[1]}.{found[2]}"


def _name_axes(graph: onnx_ir.Graph, head: Head) -> None:
    """Name the dynamic axes, and check that they are dynamic."""
    import onnx_ir as ir

    inputs = {value.name: value for value in graph.inputs}
    wanted = {"input_ids": head.axes}
    if head.caches:
        wanted["past_key_values.0.key"] = ("batch_size", "", "past_sequence_length", "")
        wanted["attention_mask"] = ("batch_size", "total_sequence_length")
    names: dict[str, str] = {}
    for name, axes in wanted.items():
        for size, axis in zip(inputs[name].shape or (), axes, strict=True):
            if not axis:
                continue
            if isinstance(size, int):
                raise ValueError(
                    f"the graph fixes {axis} of {name} at {size}; it should be dynamic. Please report "
                    "the model's class."
                )
            names.setdefault(str(size.value), axis)

    def named(size: Any) -> Any:
        if isinstance(size, int) or size.value is None:
            return size
        return ir.SymbolicDim(
            re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(size.value))
        )

    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([named(size) for size in value.shape])


def _forget_sources(graph: onnx_ir.Graph) -> None:
    """Drop the stack traces that torch.onnx notes on every operator: half a megabyte, and paths."""
    for node in graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _usage(head: Head) -> str:
    return (
        "```python\n"
        f"from optimum.onnxruntime import ORTModel{head.reader}\n\n"
        f'model = ORTModel{head.reader}.from_pretrained("REPO_OR_FOLDER")\n'
        "```\n\n"
        f"`{GRAPH_NAME}` also runs in ONNX Runtime alone, and with transformers' `ExportedModel`."
    )
