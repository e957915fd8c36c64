"""BERT-base's shape in 8 bits: compiled, and in ONNX Runtime, in turns in one process.

    python benchmarks/encoder_bits.py [--tokens 128] [--batch 1]

Random weights; zeros by magnitude. ONNX Runtime's int8 graph is of the dense model, by its dynamic
quantization (`export_onnx(..., quantize="dynamic")`). Milliseconds of a call, the least and the median.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", help="of the compiled models; this CPU's best by default")
    options = parser.parse_args()

import torch
from real_models import machine
from transformers import BertConfig, BertModel
from transformers.utils.logging import disable_progress_bar

import hf_sparse
from hf_sparse.counts import format_table

try:
    import onnxruntime
except ImportError as error:
    raise SystemExit("ONNX Runtime is needed: pip install 'hf_sparse[onnx]'") from error


def main(options: argparse.Namespace) -> None:
    """Measure all in turns, and print."""
    disable_progress_bar()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{machine()}; {options.threads} threads; load {os.getloadavg()[0]:.1f}", flush=True)
    ids = torch.randint(1000, 30000, (options.batch, options.tokens))
    calls = ways(ids, options)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(options.turns + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn > 1:
                times[name].append((time.perf_counter() - start) * 1e3)
    int8 = min(times["ONNX Runtime int8"])
    rows = [
        (name, f"{min(t):.1f}", f"{statistics.median(t):.1f}", f"{int8 / min(t):.2f}")
        for name, t in times.items()
    ]
    shape = f"{options.batch} x {options.tokens}"
    print(format_table((shape, "ms", "median", "ONNX Runtime int8 / it"), rows))


def ways(ids: torch.Tensor, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    dense: Any = BertModel(BertConfig(attn_implementation="sdpa")).eval()
    found = {
        "torch fp32": in_torch(dense, ids),
        "torch bf16": in_torch(copy.deepcopy(dense).bfloat16(), ids),
        "compiled fp32, dense": in_torch(hf_sparse.compile(dense, target=options.target), ids),
        "compiled int8, dense": in_torch(
            hf_sparse.compile(dense, bits=8, target=options.target), ids
        ),
        "compiled int4, dense": in_torch(
            hf_sparse.compile(dense, bits=4, target=options.target), ids
        ),
    }
    for zeros in (0.8, 0.9):
        sparse = copy.deepcopy(dense)
        config = hf_sparse.SparsityConfig("unstructured", zeros)
        hf_sparse.prune_(sparse, config, "magnitude")
        name = f"compiled fp32, {100 * zeros:.0f} % zeros"
        found[name] = in_torch(hf_sparse.compile(sparse, target=options.target), ids)
    for name, quantize in (("ONNX Runtime fp32", None), ("ONNX Runtime int8", "dynamic")):
        found[name] = in_onnxruntime(dense, ids, quantize, options.threads)
    return found


def in_torch(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """A model that is called with the tokens."""

    @torch.inference_mode()
    def call() -> Any:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))

    return call


def in_onnxruntime(
    model: Any, ids: torch.Tensor, quantize: str | None, threads: int
) -> Callable[[], Any]:
    """Its graph, in ONNX Runtime."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    # Threads that spin after a call would slow down whoever is measured next.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        hf_sparse.export_onnx(model, folder, quantize=quantize)
        file = str(Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    known = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    known["token_type_ids"] = torch.zeros_like(ids)
    feed = {spec.name: known[spec.name].numpy() for spec in session.get_inputs()}
    return lambda: session.run(None, feed)


if __name__ == "__main__":
    main(options)
