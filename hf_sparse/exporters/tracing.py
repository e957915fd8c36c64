"""From a model to a graph, by transformers' ONNX exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from hf_sparse.calibration.calling import run_on
from hf_sparse.exporters.heads import Case, Head, example
from hf_sparse.upstream.transformers.caches import CACHE_NAMES
from hf_sparse.upstream.transformers.exporting import (
    dynamic_axes,
    dynamic_quantizer,
    export,
    static_quantizer,
)

if TYPE_CHECKING:
    import onnx_ir

    from hf_sparse.upstream.transformers.exporting import ExportedModel


# torch.export patches torch, and standard output is redirected: for one thread at a time.
_ONE_AT_A_TIME = threading.Lock()
# The name of the cache in graphs, which is Optimum's.
_PAST = "past_key_values"
# What static quantization touches: softmax and norms in 8 bits cost too much accuracy.
_PRODUCTS = ("MatMul", "Gemm", "Gather")


def trace(
    model: PreTrainedModel,
    head: Head,
    quantize: str | None,
    batches: Sequence[dict[str, Any]] | None,
) -> ExportedModel:
    """The model as a graph, quantized if that is asked for; caches and axes are named as Optimum's.

    Args:
        model: in eval mode.
        head: of the model.
        quantize: one of `QUANTIZATIONS`, or None.
        batches: that static quantization calibrates on.

    Raises:
        ValueError: static quantization of a model with a cache, or an axis came out fixed; or the model
            takes more than the inputs of its head.
    """
    given = example(model, head, Case(2, 5, past=4 if head.caches else 0)).inputs
    with torch.no_grad():
        run_on(model, given)  # tells of inputs that it takes beside these
    quantizer = None
    if quantize == "dynamic":
        quantizer = dynamic_quantizer()
    elif quantize == "static":
        if head.caches:
            raise ValueError(
                "static quantization of a model with a cache is not supported: use 'dynamic'."
            )
        samples = [_completed(batch, given) for batch in batches or ()]
        quantizer = static_quantizer(samples, _PRODUCTS)
    axes = _varying_axes(given)
    with _ONE_AT_A_TIME, _silenced():
        exported = export(model, given, axes, quantizer)
    component = exported.components["model"]
    graph = component.program.graph
    if head.caches:
        _rename_caches(graph)
        component.metadata.kwargs = {
            _PAST if name in CACHE_NAMES else name: value
            for name, value in component.metadata.kwargs.items()
        }
    _name_axes(graph, head)
    _forget_sources(graph)
    _sum_residuals(graph)
    return exported


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """torch.onnx, transformers' exporters and ONNX Runtime's quantizer print remarks on themselves."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _completed(batch: dict[str, Any], traced: dict[str, Any]) -> dict[str, Any]:
    """A batch with all inputs of the graph: no padding and one segment where it tells of none."""
    ids = torch.as_tensor(batch["input_ids"])
    usual = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return {name: torch.as_tensor({**usual, **batch}[name]) for name in traced}


def _varying_axes(inputs: dict[str, Any]) -> dict[str, Any]:
    """Which axes vary: all of token ids and masks, batch and tokens of keys and values."""
    tensors = {name: value for name, value in inputs.items() if name != "use_cache"}
    axes = dynamic_axes(tensors)
    for name in axes.keys() & set(CACHE_NAMES):
        axes[name] = [
            {axis: size for axis, size in leaf.items() if axis in (0, 2)} for leaf in axes[name]
        ]
    return axes


def _rename_caches(graph: onnx_ir.Graph) -> None:
    """Name keys and values as Optimum does: `past_key_values.0.key` and `present.0.key`."""
    for values, start in ((graph.inputs, _PAST), (graph.outputs, "present")):
        for value in values:
            match = re.fullmatch(
                rf".*({'|'.join(CACHE_NAMES)})\.layers\.(\d+)\.(key|value)s", value.name or ""
            )
            if match:
                value.name = f"{start}.{match[2]}.{match[3]}"


def _name_axes(graph: onnx_ir.Graph, head: Head) -> None:
    """Name the dynamic axes, and check that they are dynamic."""
    import onnx_ir as ir

    inputs = {value.name: value for value in graph.inputs}
    wanted = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), head.axes)
    wanted = {name: axes for name, axes in wanted.items() if name in inputs}
    if head.caches:
        caches = [name for name in inputs if name and name.startswith(f"{_PAST}.")]
        wanted |= dict.fromkeys(caches, ("batch_size", "", "past_sequence_length", ""))
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


def _sum_residuals(graph: onnx_ir.Graph) -> None:
    """Write additions before norms as `Sum`, which ONNX Runtime does not fuse with the norm.

    Of Add and LayerNormalization it makes SkipLayerNormalization, which takes seven times as long as
    the two on CPUs (ONNX Runtime 1.31, `benchmarks/onnx_graphs.py --norms`).
    """
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type == "Add" and any(
            user.op_type == "LayerNormalization" for user, _ in node.outputs[0].uses()
        ):
            added = ir.node("Sum", list(node.inputs), name=node.name)
            ir.convenience.replace_nodes_and_values(
                graph, node, [node], [added], list(node.outputs), list(added.outputs)
            )
