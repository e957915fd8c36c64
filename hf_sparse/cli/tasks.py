"""The command `eval --tasks`: zero-shot tasks, of a model and of the dense one beside it."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import hf_sparse
from hf_sparse.cli.loading import load, load_tokenizer, model_config
from hf_sparse.cli.recording import record
from hf_sparse.provenance.record import provenance_of
from hf_sparse.zeroshot.tasks import examples_of
from hf_sparse_cli.tasks import task_names


def evaluate_tasks(options: argparse.Namespace) -> int:
    """Measure a model on tasks, print the figures, and record them if that is asked for."""
    sources = [source for source in (options.model, options.dense) if source is not None]
    for source in sources:  # what is missing is told before the first one is measured
        load_tokenizer(source, options, model_config(source, options))
    names = task_names(options)
    if options.task_data is not None:
        examples_of(names, options.task_data)
    report, known = _measured(options.model, options, names)
    if options.dense is not None:
        beside, _ = _measured(options.dense, options, names)
        report = replace(report, dense=beside.scores)
    if options.json:
        print(json.dumps(report.to_dict()))
    else:
        print(report)
        if options.dense is None:
            print("Give --dense MODEL to see the dense model's figures beside them.")
    if options.record:
        record(options, known, report.metrics)
    return 0


def _measured(source: str, options: argparse.Namespace, names: list[str]) -> tuple[Any, Any]:
    """The figures of a model, and what is known of it."""
    model, tokenizer = load(source, options)
    report = hf_sparse.evaluate_choices(
        model,
        tokenizer,
        names,
        data=options.task_data,
        limit=options.limit,
        batch_size=options.batch_size or 16,
    )
    return report, provenance_of(model)
