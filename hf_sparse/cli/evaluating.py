"""The command `eval`: perplexity, accuracy, or zero-shot tasks, of a sparse model and the dense one."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from hf_sparse.checkpoint.measured import record_metrics_
from hf_sparse.cli.loading import load, load_tokenizer, measurement, model_config
from hf_sparse.cli.recording import record
from hf_sparse.cli.tasks import evaluate_tasks
from hf_sparse.counts import format_table
from hf_sparse.provenance.record import provenance_of
from hf_sparse.provenance.values import Metric, Provenance


def evaluate(options: argparse.Namespace) -> int:
    """Measure a model, and the dense one beside it."""
    if options.tasks is not None:
        return evaluate_tasks(options)
    measure = measurement(options)
    name = metric_name(options)
    if options.record:
        Metric(name, 0.0)  # a name that no card takes is told before anything is measured
    sources = [source for source in (options.model, options.dense) if source is not None]
    for source in sources:  # what is missing, too
        load_tokenizer(source, options, model_config(source, options))
    figures = {}
    known = Provenance()
    for kind, source in (("sparse", options.model), ("dense", options.dense)):
        if source is None:
            continue
        model, tokenizer = load(source, options)
        figures[kind] = measure(model, tokenizer)
        if options.record and kind == "sparse":
            record_metrics_(model, [])  # which weights these are
            known = provenance_of(model)
    _show(options, figures)
    if options.record:
        if not all(map(math.isfinite, figures.values())):
            raise ValueError(f"the {name} is not finite: there is nothing to record.")
        record(options, known, [Metric(name, figures["sparse"], figures.get("dense"))])
    return 0


def metric_name(options: argparse.Namespace) -> str:
    """What is measured, and on what, for a card."""
    files = ", ".join(Path(file).name for file in options.labels or options.text)
    if options.labels:
        return f"accuracy, {files}"
    count = "all" if options.max_windows is None else options.max_windows
    return f"perplexity, {files}, {count} x {options.window} tokens"


def _show(options: argparse.Namespace, figures: dict[str, float]) -> None:
    metric = "accuracy" if options.labels else "perplexity"
    if options.json:
        finite = {name: f if math.isfinite(f) else None for name, f in figures.items()}
        print(json.dumps({"metric": metric, "window": options.window, **finite}))
        return
    rows = [(name, f"{figure:.4f}") for name, figure in figures.items()]
    print(format_table(("model", metric), rows))
    if "dense" not in figures:
        print("Give --dense MODEL to see the dense model's figure beside it.")
