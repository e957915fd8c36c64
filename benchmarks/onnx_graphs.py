"""ONNX graphs of MiniLM on SST-2: size, load, memory, latency and accuracy, dense to shrunk int8.

    python benchmarks/onnx_graphs.py --data DATA/glue --sparse FOLDER [--shrunk FOLDER]

FOLDER are checkpoints of sparse classifiers (`make sst2`, `benchmarks/shrink.py`). The dense one is
the teacher that `benchmarks/glue_sparsity.py` trained. All graphs are exported by
`hf_sparse.export_onnx` and run in stock ONNX Runtime. Loads are timed in processes of their own, calls
in turns; medians, and the ratio to the dense graph in the same turn (10th to 90th percentile).

`--openvino PYTHON` also opens every graph with OpenVINO, in the environment of that interpreter.
`--norms` alone times ONNX Runtime's fused addition and norm against the two that our graphs have.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder with sst2")
    parser.add_argument("--sparse", type=Path, help="checkpoint: make sst2")
    parser.add_argument("--shrunk", type=Path, help="checkpoint: benchmarks/shrink.py")
    parser.add_argument("--teacher", type=Path, default=Path("glue_work/teachers/sst2-0.pt"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="loads of each graph")
    parser.add_argument("--calls", type=int, default=30, help="calls of each graph and size")
    parser.add_argument("--norms", action="store_true", help="time additions and norms alone")
    parser.add_argument("--openvino", metavar="PYTHON", help="interpreter that has OpenVINO")
    options = parser.parse_args()
    if not options.norms and None in (options.data, options.sparse):
        parser.error("wanted --data and --sparse, or --norms")

import numpy as np
import torch
from glue import TASKS, Data, load_model
from real_models import machine
from transformers import AutoModelForSequenceClassification

import hf_sparse

try:
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper
except ImportError as error:
    raise SystemExit("ONNX Runtime is needed: pip install 'hf_sparse[onnx]'") from error

SIZES = ((1, 128), (8, 128))
LOADING = """
import sys, time
import onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM:")).split()[1])
before = peak()
start = time.perf_counter()
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(time.perf_counter() - start, (peak() - before) * 1024 / 1e6)
"""
OPENING = """
import sys, time
import numpy as np, openvino
start = time.perf_counter()
threads = {"INFERENCE_NUM_THREADS": int(sys.argv[2])}
compiled = openvino.Core().compile_model(sys.argv[1], "CPU", threads)
loaded = time.perf_counter() - start
feed = dict(np.load(sys.argv[3]))
found = compiled(feed)[compiled.output(0)]
times = []
for _ in range(15):
    start = time.perf_counter(); compiled(feed); times.append(time.perf_counter() - start)
print(loaded, sorted(times)[7], float(np.abs(found - np.load(sys.argv[4])).max()))
"""


def main(options: argparse.Namespace) -> None:
    """Export, measure, print."""
    if options.norms:
        print(f"{machine()}; ONNX Runtime {ort.__version__}, {options.threads} threads\n")
        print_norms(options)
        return
    torch.set_num_threads(options.threads)
    task = TASKS["sst2"]
    dense, tokenizer = load_model(task)
    dense.load_state_dict(torch.load(options.teacher, weights_only=True, map_location="cpu"))
    validation = Data(options.data / "sst2", task, "validation", tokenizer)
    models: dict[str, tuple[Any, dict[str, Any]]] = {"dense": (dense, {"pack": False})}
    for kind, folder in (("sparse", options.sparse), ("shrunk", options.shrunk)):
        if folder is not None:
            model = AutoModelForSequenceClassification.from_pretrained(folder)
            if kind == "sparse":
                models["sparse, not packed"] = (model, {"pack": False})
            models[kind] = (model, {})
            models[f"{kind}, int8 dynamic"] = (model, {"quantize": "dynamic"})
            batches = [validation.collate(list(range(n, n + 8))) for n in range(0, 64, 8)]
            static = {"quantize": "static", "batches": batches}
            models[f"{kind}, int8 static"] = (model, static)
    with tempfile.TemporaryDirectory() as temporary:
        graphs = {}
        for name, (model, settings) in models.items():
            report = hf_sparse.export_onnx(model, Path(temporary) / name, **settings)
            graphs[name] = report
            print(f"{name}: {report}".replace(temporary, "."), flush=True)
        print(f"\n{machine()}; ONNX Runtime {ort.__version__}, {options.threads} threads\n")
        print_table(graphs, validation, options)
        if options.openvino:
            print_openvino(graphs, options)


def print_table(graphs: dict[str, Any], validation: Data, options: argparse.Namespace) -> None:
    """One line for each graph."""
    loads: dict[str, list[list[float]]] = {name: [] for name in graphs}
    for _ in range(options.repeats):
        for name, report in graphs.items():
            loads[name].append(run(sys.executable, LOADING, report.folder, options))
    sessions = {name: session(report.folder, options.threads) for name, report in graphs.items()}
    times = {size: in_turns(sessions, feed(*size), options.calls) for size in SIZES}
    head = ["graph", "MB", "load, ms", "peak of loading, MB"]
    for batch, tokens in SIZES:
        head += [f"{batch} x {tokens}, ms", "dense over it"]
    print("| " + " | ".join([*head, "accuracy"]) + " |\n" + "|---" * (len(head) + 1) + "|")
    for name, report in graphs.items():
        seconds, peak = (statistics.median(column) for column in zip(*loads[name], strict=True))
        columns = [name, f"{report.bytes / 1e6:.1f}", f"{1e3 * seconds:.0f}", f"{peak:.0f}"]
        for size in SIZES:
            columns.append(f"{1e3 * statistics.median(times[size][name]):.1f}")
            columns.append(ratio(times[size]["dense"], times[size][name]))
        columns.append(f"{accuracy(sessions[name], validation):.2f}")
        print("| " + " | ".join(columns) + " |", flush=True)


def print_openvino(graphs: dict[str, Any], options: argparse.Namespace) -> None:
    """What OpenVINO makes of the same files."""
    print("\n| OpenVINO | load, ms | 1 x 128, ms | difference to ONNX Runtime |\n|---|---|---|---|")
    given = feed(1, 128)
    for name, report in graphs.items():
        np.savez(report.folder / "feed.npz", **given)
        (wanted,) = session(report.folder, options.threads).run(None, given)
        np.save(report.folder / "wanted.npy", wanted)
        files = (report.folder / "feed.npz", report.folder / "wanted.npy")
        loaded, latency, difference = run(options.openvino, OPENING, report.folder, options, *files)
        print(
            f"| {name} | {1e3 * loaded:.0f} | {1e3 * latency:.1f} | {difference:.1e} |", flush=True
        )


def print_norms(options: argparse.Namespace) -> None:
    """Addition and LayerNormalization, which ONNX Runtime fuses, and as they are written here."""
    print("| tokens x features | Add, fused, ms | Sum, ms | fused over it |\n|---|---|---|---|")
    for tokens, features in ((128, 384), (128, 768), (1024, 384), (1024, 768)):
        rng = np.random.default_rng(0)
        given = {name: rng.standard_normal((1, tokens, features), np.float32) for name in "xy"}
        sessions = {
            name: opened(addition_and_norm(name, features), options.threads)
            for name in ("Add", "Sum")
        }
        times = in_turns(sessions, given, 10 * options.calls)
        fused, apart = (f"{1e3 * statistics.median(times[name]):.3f}" for name in ("Add", "Sum"))
        print(
            f"| {tokens} x {features} | {fused} | {apart} | {ratio(times['Add'], times['Sum'])} |"
        )


def addition_and_norm(operator: str, features: int) -> bytes:
    """A graph that adds two tensors by this operator and normalises the sum."""
    shape = ["batch", "tokens", features]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    outputs = [helper.make_tensor_value_info("normed", TensorProto.FLOAT, shape)]
    weights = [
        numpy_helper.from_array(np.full(features, value, np.float32), name)
        for name, value in (("scale", 1.0), ("shift", 0.0))
    ]
    nodes = [
        helper.make_node(operator, ["x", "y"], ["added"]),
        helper.make_node("LayerNormalization", ["added", "scale", "shift"], ["normed"], axis=-1),
    ]
    graph = helper.make_graph(nodes, "norm", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    found: bytes = model.SerializeToString()
    return found


def run(
    python: str, script: str, folder: Path, options: argparse.Namespace, *files: Path
) -> list[float]:
    """The numbers that a script prints in a process of its own."""
    command = [python, "-c", script, folder / "model.onnx", options.threads, *files]
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True
    )
    return [float(word) for word in done.stdout.split()]


def session(folder: Path, threads: int) -> ort.InferenceSession:
    """Open an export."""
    return opened(folder / "model.onnx", threads)


def opened(graph: Path | bytes, threads: int) -> ort.InferenceSession:
    """Open a graph."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that wait for one graph's work would take the cores from the next one's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def feed(batch: int, tokens: int) -> dict[str, np.ndarray]:
    """Random token ids without padding."""
    ids = np.random.default_rng(0).integers(1000, 20000, (batch, tokens))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return {**inputs, "token_type_ids": np.zeros_like(ids)}


def in_turns(
    sessions: dict[str, ort.InferenceSession], given: dict[str, np.ndarray], calls: int
) -> dict[str, list[float]]:
    """Seconds of each call, the graphs taking turns."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(calls + 3):
        for name, graph in sessions.items():
            start = time.perf_counter()
            graph.run(None, given)
            if number >= 3:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(dense: list[float], other: list[float]) -> str:
    """The median of the ratios of neighbouring calls, with their spread."""
    ratios = sorted(a / b for a, b in zip(dense, other, strict=True))
    low, high = (ratios[int(share * (len(ratios) - 1))] for share in (0.1, 0.9))
    return f"{statistics.median(ratios):.2f} ({low:.2f}-{high:.2f})"


def accuracy(graph: ort.InferenceSession, validation: Data) -> float:
    """On the validation set, times 100."""
    hits, count = 0, 0
    for batch in validation.batches(64, None):
        labels = batch.pop("labels").numpy()
        batch.setdefault("token_type_ids", torch.zeros_like(batch["input_ids"]))
        (scores,) = graph.run(None, {name: value.numpy() for name, value in batch.items()})
        hits += int((scores.argmax(1) == labels).sum())
        count += len(labels)
    return 100 * hits / count


if __name__ == "__main__":
    main(options)
