"""Which model types can be exported to ONNX: a tiny random model of each, pruned, written and compared.

    python benchmarks/onnx_families.py --out benchmarks/results/onnx_families.jsonl    # all; resumes
    python benchmarks/onnx_families.py --types bert roberta t5
    python benchmarks/onnx_families.py --out FILE --table                              # of known rows

For each type of AutoConfig: the first head that `hf_sparse.export_onnx` takes, of a config that
`tests/support/any_models.py` makes small. Its row tells what came of it:

    passes     the graph runs in ONNX Runtime and gives what the model gives in torch, at every size
    written    `export_onnx` refuses such a model (it takes more than token ids); transformers' own
               exporter writes it, and for the inputs of the trace the graph gives what the model gives
    differs    the graph gives something else than the model
    fails      the exporter's own reason
    not built  no small model of the type can be made, or none is known to run

Processes try the types, and each has `--seconds` of CPU time there; what does not end by then, fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--types", nargs="*", help="default: all")
    parser.add_argument(
        "--out", type=Path, help="file of JSON lines; types that it has are skipped"
    )
    parser.add_argument("--seconds", type=float, default=180, help="of CPU, limit for a type")
    parser.add_argument("--chunk", type=int, default=40, help="types that a process tries")
    parser.add_argument("--table", action="store_true", help="only print what is known")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.calibration.modes import switched
from hf_sparse.exporters.heads import head_of
from tests.support.any_models import (
    build,
    classes_of,
    dummy_inputs,
    model_types,
    outputs_of,
    tiny_config,
)

_LONGEST = 300  # characters of a reason
_CLOSE = 1e-3
_KINDS = ("passes", "written", "differs", "fails", "not built")
Row = dict[str, str]


def main(options: argparse.Namespace) -> None:
    """Try the types that have no row yet, and print the table."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if options.worker:
        for model_type in options.types:
            print(json.dumps(tried(model_type)), flush=True)
        return
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    known = read(options.out)
    wanted = options.types or model_types()
    todo = [] if options.table else [name for name in wanted if name not in known]
    while todo:
        done = work(todo[: options.chunk], options.seconds)
        for row in done:
            known[row["type"]] = row
            print(f"| {row['type']} | {row['class']} | {row['result']} |", flush=True)
            if options.out is not None:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        todo = todo[len(done) :]
    summarise([known[name] for name in wanted if name in known])


def read(file: Path | None) -> dict[str, Row]:
    """The rows that are there, by type."""
    if file is None or not file.exists():
        return {}
    rows: list[Row] = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["type"]: row for row in rows}


def work(types: list[str], seconds: float) -> list[Row]:
    """Try types in a process of its own, up to one that takes too long or kills it."""
    command = [sys.executable, __file__, "--worker", "--types", *types]
    rows: list[Row] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_hand_over, args=(process.stdout, lines), daemon=True).start()
        used = 0.0
        while len(rows) < len(types):
            try:
                line = lines.get(timeout=2)
            except queue.Empty:
                if _cpu_seconds(process.pid) < used + seconds:
                    continue
                process.kill()
                told = f"fails: no end after {seconds:.0f} s of CPU"
                rows.append(_row(types[len(rows)], "", told))
                return rows
            if line is None:
                told = f"fails: the process ended with code {process.wait()}"
                rows.append(_row(types[len(rows)], "", told))
                return rows
            if line.startswith("{"):
                rows.append(json.loads(line))
                used = _cpu_seconds(process.pid)
    return rows


def _cpu_seconds(pid: int) -> float:
    """What a process has used of CPUs so far (Linux); infinite if it has ended."""
    try:
        numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.inf
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


def _hand_over(source: Any, lines: queue.Queue[str | None]) -> None:
    for line in source:
        lines.put(line)
    lines.put(None)


def _row(model_type: str, name: str, result: str) -> Row:
    return {"type": model_type, "class": name, "result": result}


def tried(model_type: str) -> Row:
    """What comes of a type."""
    try:
        config = tiny_config(model_type)
        first = None
        for model_class in classes_of(config):
            model = build(config, model_class)
            first = first or model
            try:
                head_of(model)
            except ValueError:
                continue
            result = _exported(model)
            if not result.startswith("refused"):
                return _row(model_type, model_class.__name__, result)
            break
    except Exception as error:  # whatever classes of others raise at sizes that they do not like
        return _row(model_type, "", f"not built: {_told(error)}")
    return _row(model_type, type(first).__name__, _written(first))


def _exported(model: Any) -> str:
    """By `hf_sparse.export_onnx`."""
    try:
        hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5), "magnitude")
        with tempfile.TemporaryDirectory() as folder:
            hf_sparse.export_onnx(model, Path(folder) / "graph")
    except Exception as error:  # the table is about what exporters raise, whatever it is
        return f"{_blame(error)}: {_told(error)}"
    return "passes"


def _written(model: Any) -> str:
    """By transformers' exporter alone, with the inputs that the model is tried on."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    inputs, problem = None, "no inputs are known for it"
    for given in dummy_inputs(model):
        try:
            outputs_of(model, given)
        except Exception as error:
            problem = _told(error)
            continue
        inputs = given
        break
    if inputs is None:
        return f"not built: does not run: {problem}"
    try:
        with switched(model, training=False, use_cache=False, return_dict=True), torch.no_grad():
            wanted = outputs_of(model, inputs)
            exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=False))
            with tempfile.TemporaryDirectory() as folder:
                exported.save_pretrained(folder)
            found = outputs_of(exported, inputs)
    except Exception as error:
        return f"fails: {_told(error)}"
    if len(found) != len(wanted) or any(
        a.shape != b.shape for a, b in zip(found, wanted, strict=True)
    ):
        return f"differs: {len(found)} outputs of the graph, {len(wanted)} of the model"
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if b.numel()]
    far = max(
        (float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in pairs), default=0
    )
    return "written" if far < _CLOSE else f"differs: by {far:.1e} of the largest output"


def _blame(error: Exception) -> str:
    """Whether hf_sparse refused, the graph differs, or the exporter failed."""
    trace, file = error.__traceback__, ""
    while trace is not None:
        file, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    if "/hf_sparse/" not in file:
        return "fails"
    if str(error).startswith("the graph fixes"):
        return "fails"
    return "differs" if str(error).startswith(("the graph", "output ")) else "refused"


def _told(error: BaseException) -> str:
    """The reason, on one line; of torch.onnx's reports the cause that they name last."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:_LONGEST]}"


def summarise(rows: list[Row]) -> None:
    """Print the counts, and the reasons that more than one type has."""
    by_kind = {kind: [row for row in rows if row["result"].startswith(kind)] for kind in _KINDS}
    for kind, own in by_kind.items():
        print(f"{kind}: {len(own)}")
    for kind in ("fails", "differs"):
        reasons: dict[str, list[str]] = {}
        for row in by_kind[kind]:
            reasons.setdefault(_shape_of(row["result"]), []).append(row["type"])
        for reason, types in sorted(reasons.items(), key=lambda item: -len(item[1])):
            print(f"{len(types)} x {reason}: {', '.join(types)}")


def _shape_of(result: str) -> str:
    """A reason without what differs from type to type."""
    return re.sub(r"\d+", "N", result)[:110]


if __name__ == "__main__":
    main(options)
