"""Compiled sparse models against other runtimes on the CPU, in alternation, on the same weights.

    python benchmarks/peers.py --install            sets up .peers/NAME, an environment per runtime
    python benchmarks/peers.py                      BERT-base's shape, random weights, magnitude
    python benchmarks/peers.py --model FOLDER       a sparse checkpoint, and its zeros made dense
    python benchmarks/peers.py --target avx2        every runtime that can be is held to AVX2
    python benchmarks/peers.py --table FILE         prints the tables of an earlier run

Every runtime is a process of its own with 2 threads that waits for its turn; in each round all are
timed once, after a call that is not timed, so that slow phases of the machine meet all of them.
Medians, and ratios of medians with the quartiles of the rounds' own ratios. TensorFlow has random
weights, which makes no difference to a dense runtime; IREE and TensorFlow are skipped where only
sparse weights are compared. `int8` is ONNX Runtime's dynamic quantization of the dense model. With
`--target`, torch and OpenVINO are held by oneDNN's variable. ONNX Runtime has none and keeps what the
CPU has; DeepSparse is left out, since its products of dense weights are faster with NM_ARCH=avx2 than
AVX2 can be.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--install", action="store_true", help="set up the runtimes, and stop")
    parser.add_argument("--root", type=Path, default=Path(".peers"), help="their environments")
    parser.add_argument("--work", type=Path, default=Path("bench_output/peers"), help="models")
    parser.add_argument("--model", type=Path, help="a sparse checkpoint instead of random weights")
    parser.add_argument("--target", choices=["avx2"], help="hold runtimes to instructions")
    parser.add_argument("--shapes", nargs="+", metavar="BATCHxTOKENS", help="some of SHAPES")
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument("--plot", type=Path, help="a picture of the milliseconds")
    parser.add_argument("--table", type=Path, help="only print the tables of this JSON file")
    args = parser.parse_args()

import torch
from real_models import machine
from transformers import AutoModel, BertConfig, BertModel

import hf_sparse

ENVIRONMENTS = {
    "onnxruntime": ["onnxruntime==1.31.1", "numpy"],
    "openvino": ["openvino", "numpy"],
    "deepsparse": ["deepsparse==1.8.0"],
    "tensorflow": ["tensorflow-cpu", "keras-hub"],
    "iree": ["iree-base-compiler[onnx]", "iree-base-runtime", "numpy"],
}
VARIANTS = {
    "dense": None,
    "50 %": ("unstructured", 0.5),
    "80 %": ("unstructured", 0.8),
    "90 %": ("unstructured", 0.9),
    "95 %": ("unstructured", 0.95),
    "80 % 4x1": ("block:4x1", 0.8),
    "90 % 4x1": ("block:4x1", 0.9),
    "95 % 4x1": ("block:4x1", 0.95),
}
Shapes = tuple[tuple[int, int], ...]
# Batch, tokens: rounds.
SHAPES = {(1, 128): 15, (1, 384): 7, (8, 128): 5, (32, 128): 3}
# What holds runtimes to a target; `HF_SPARSE_TARGET` is read by peer_worker.py alone.
HELD = {
    "avx2": {
        "HF_SPARSE_TARGET": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
}
# Between two calls: threads that still spin come to rest.
_PAUSE = 0.1


@dataclass
class Peer:
    """A runtime with a model, in its own process."""

    name: str
    variant: str
    process: subprocess.Popen
    shapes: Shapes

    def time(self, shape: tuple[int, int]) -> float:
        """Milliseconds of one call."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{shape[0]} {shape[1]}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ({self.variant}) stopped; see its log")
        return float(answer)


def install(root: Path) -> None:
    """Make the environments that are not there yet."""
    for name, packages in ENVIRONMENTS.items():
        python = root / name / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", root / name], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    needed = ["onnx", "onnxscript"]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *needed], check=True)


def export(model: Any, file: Path, fixed: bool) -> None:
    """Write the encoder as ONNX in the way that old runtimes read."""

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, return_dict=False
            )[0]

    ids = torch.randint(0, 1000, (1, 128))
    names = ["input_ids", "attention_mask"]
    axes = None if fixed else {name: {0: "batch", 1: "tokens"} for name in [*names, "out"]}
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    torch.onnx.export(
        Encoder(),
        (ids, torch.ones_like(ids)),
        file,
        dynamo=False,
        opset_version=17 if fixed else 14,
        input_names=names,
        output_names=["out"],
        dynamic_axes=axes,
    )
    model.set_attn_implementation(implementation)


def prepare(work: Path, source: Path | None, iree: Path | None) -> list[str]:
    """Write every variant as a folder and an ONNX file; returns their names."""
    work.mkdir(parents=True, exist_ok=True)
    names = ["dense", "sparse"] if source else list(VARIANTS)
    for name in names:
        folder = work / name.replace(" ", "").replace("%", "")
        if (folder / "model.onnx").exists() and source is None:
            continue
        torch.manual_seed(0)
        if source:
            model = AutoModel.from_pretrained(source).eval()
        else:
            model = BertModel(BertConfig()).eval()
            if VARIANTS[name]:
                hf_sparse.prune_(model, hf_sparse.SparsityConfig(*VARIANTS[name]), "magnitude")
        plain = hf_sparse.SparsityConfig("unstructured", 0.0, format="dense")
        hf_sparse.save_pretrained(model, folder, plain)
        export(model, folder / "model.onnx", fixed=False)
        if name == "dense":
            hf_sparse.export_onnx(model, folder / "int8", quantize="dynamic")
        if name == "dense" and source is None and iree is not None:
            fixed = work / "fixed.onnx"
            export(model, fixed, fixed=True)
            binaries = iree / "bin"
            module = fixed.with_suffix(".mlir")
            convert = [binaries / "iree-import-onnx", fixed, "-o", module, "--opset-version", "17"]
            subprocess.run(convert, check=True)
            options = ["--iree-hal-target-backends=llvm-cpu", "--iree-llvmcpu-target-cpu=host"]
            out = work / "dense" / "model.vmfb"
            subprocess.run([binaries / "iree-compile", module, *options, "-o", out], check=True)
    return names


def start(
    work: Path,
    root: Path,
    names: list[str],
    everything: Shapes,
    whole: bool,
    log: Path,
    held: dict[str, str],
) -> list[Peer]:
    """Start every runtime that is to be compared, with the variables `held` in its environment."""
    wanted: list[tuple[str, str, Shapes]] = [("ours", name, everything) for name in names]
    dense: list[tuple[str, Shapes]] = [
        ("torch", everything),
        ("torch-bf16", everything),
        ("torch-compile", everything),
        ("torch-compile-bf16", everything),
        ("onnxruntime", everything),
        ("onnxruntime-int8", everything),
        ("openvino", everything),
    ]
    if not held:
        dense.append(("deepsparse", everything))
    if whole:
        dense += [("tensorflow", everything), ("iree", ((1, 128),))]
    wanted += [(kind, "dense", shapes) for kind, shapes in dense]
    zeros = [name for name in names if name != "dense" and "4x1" not in name and not held]
    wanted += [("deepsparse", name, everything) for name in zeros]
    peers = []
    for kind, name, shapes in wanted:
        folder = work / name.replace(" ", "").replace("%", "")
        local = kind == "ours" or kind.startswith("torch")
        runtime, _, of = kind.partition("-")
        python = sys.executable if local else str(root / runtime / "bin" / "python")
        if not Path(python).exists():
            raise FileNotFoundError(f"{python} is not there: run peers.py --install first")
        model = folder if local else folder / ("model.vmfb" if kind == "iree" else "model.onnx")
        if of == "int8":
            model = folder / "int8" / "model.onnx"
        worker = Path(__file__).with_name("peer_worker.py")
        with open(log, "a") as errors:
            process = subprocess.Popen(
                [python, worker, kind, model],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **held},
            )
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{kind} with {name} did not start; see {log}")
        peers.append(Peer(kind, name, process, shapes))
        print(f"started {kind}, {name}", file=sys.stderr, flush=True)
    return peers


def measure(peers: list[Peer]) -> list[dict[str, Any]]:
    """Time all peers in rounds; one line per shape and peer."""
    lines = []
    for shape, rounds in SHAPES.items():
        chosen = [peer for peer in peers if shape in peer.shapes]
        times: dict[int, list[float]] = {id(peer): [] for peer in chosen}
        if not chosen:
            continue
        for peer in chosen:
            peer.time(shape)  # prepares the shape
        for _ in range(rounds):
            for peer in chosen:
                time.sleep(_PAUSE)
                times[id(peer)].append(peer.time(shape))
        for peer in chosen:
            line = {"runtime": peer.name, "model": peer.variant, "shape": list(shape)}
            lines.append({**line, "ms": [round(value, 3) for value in times[id(peer)]]})
        print(f"measured {shape}", file=sys.stderr, flush=True)
    return lines


def tables(result: dict[str, Any]) -> str:
    """For each shape: milliseconds, and how many times faster our sparse models are."""
    text = [result["machine"]]
    lines = result["lines"]
    for shape in dict.fromkeys(tuple(line["shape"]) for line in lines):
        of_shape = [line for line in lines if tuple(line["shape"]) == shape]
        ours = [line for line in of_shape if line["runtime"] == "ours" and line["model"] != "dense"]
        head = ["runtime", "model", "ms", *(f"ours {line['model']}" for line in ours)]
        rows = []
        for line in of_shape:
            row = [line["runtime"], line["model"], f"{statistics.median(line['ms']):.1f}"]
            row += ["" if line in ours else ratio(line["ms"], one["ms"]) for one in ours]
            rows.append(row)
        text.append(
            f"\nbatch {shape[0]} x {shape[1]} tokens: ms, and times our sparse model's speed"
        )
        text.append("| " + " | ".join(head) + " |")
        text.append("|" + "---|" * len(head))
        text += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(text)


def ratio(theirs: list[float], ours: list[float]) -> str:
    """The ratio of medians, and the quartiles of the ratios of each round."""
    each = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    low, high = each[len(each) // 4], each[-1 - len(each) // 4]
    return f"{statistics.median(theirs) / statistics.median(ours):.2f} ({low:.1f}-{high:.1f})"


def plot(result: dict[str, Any], file: Path) -> None:
    """Bars of the milliseconds for batch 1 x 128."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise SystemExit("Matplotlib draws the plot: pip install 'hf_sparse[plots]'") from error

    lines = [line for line in result["lines"] if line["shape"] == [1, 128]]
    lines.sort(key=lambda line: -statistics.median(line["ms"]))
    figure, axes = plt.subplots(figsize=(7, 0.28 * len(lines) + 1))
    colours = ["tab:green" if line["runtime"] == "ours" else "tab:gray" for line in lines]
    labels = [f"{line['runtime']}, {line['model']}" for line in lines]
    axes.barh(labels, [statistics.median(line["ms"]) for line in lines], color=colours)
    axes.set_xlabel("ms, batch 1 x 128, 2 threads")
    figure.tight_layout()
    figure.savefig(file)


def main(args: argparse.Namespace) -> None:
    """Install, measure, or print."""
    if args.install:
        install(args.root)
        return
    if args.table:
        result = json.loads(args.table.read_text())
    else:
        torch.set_num_threads(2)
        work = args.work / args.model.name if args.model else args.work / "bert-base"
        whole = args.model is None and args.target is None
        held = HELD.get(args.target, {})
        names = prepare(work, args.model, args.root / "iree" if whole else None)
        chosen = args.shapes or [f"{batch}x{tokens}" for batch, tokens in SHAPES]
        shapes = tuple(shape for shape in SHAPES if f"{shape[0]}x{shape[1]}" in chosen)
        peers = start(work, args.root, names, shapes, whole, args.work / "log.txt", held)
        told = "".join(f", {name}={value}" for name, value in held.items())
        result = {"machine": f"{machine()}{told}", "lines": measure(peers)}
        if args.out:
            args.out.write_text(json.dumps(result))
    print(tables(result))
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main(args)
