"""evaluate_choices: zero-shot tasks, scored as lm-evaluation-harness scores them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_sparse.arguments import check_has_values, check_kinds, check_model
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.texts import check_tokenizer
from hf_sparse.checkpoint.measured import record_metrics_
from hf_sparse.zeroshot.examples import Example
from hf_sparse.zeroshot.likelihood import Reader, Request, likelihoods
from hf_sparse.zeroshot.report import ChoiceReport, TaskScores
from hf_sparse.zeroshot.tasks import TASKS, examples_of


def evaluate_choices(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Iterable[str] | Mapping[str, Any],
    *,
    data: str | os.PathLike[str] | None = None,
    dense: nn.Module | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> ChoiceReport:
    """Measure a causal language model on zero-shot tasks, and the dense one beside it.

    Prompts and scores are those of lm-evaluation-harness: `acc` takes the choice of the highest
    likelihood, `acc_norm` that of the highest likelihood over its number of characters. Of LAMBADA
    `acc` is the share of last words that the model would say, of BLiMP the mean over its paradigms.

    The model remembers the figures: a model card tells them as long as its weights stay the same.

    Args:
        model: a causal language model.
        tokenizer: of the model, and of the dense one.
        tasks: names: `"arc_easy"`, `"arc_challenge"`, `"piqa"`, `"openbookqa"`, `"boolq"`,
            `"hellaswag"`, `"winogrande"`, `"lambada_openai"`, `"blimp"`. Or a mapping from names, of
            any kind, to a `.jsonl` file or a list of rows each. A row has `context`, `choices` and
            `label`; or `contexts`, `continuation` and `label`; or `good` and `bad`; or `context` and
            `continuation`; of a task above also the fields of its data set on the Hub.
        data: folder with a file of rows for each name, as `arc_easy.jsonl`. None: the data sets are
            taken from the Hub, which needs the package `datasets`.
        dense: the dense model, to be measured beside.
        limit: the first so many examples of each task only.
        batch_size: sequences in one forward pass; memory is mostly batch_size * tokens * vocabulary.

    Returns:
        The figures with standard errors; print it, or see `.metrics`.

    Raises:
        ValueError: unknown tasks, rows that are no examples, a choice that is longer than the model
            can take, a tokenizer or a model of another kind.
        OSError: a file is missing, or the Hub cannot be reached.
    """
    check_model(model, "evaluate_choices", PreTrainedModel)
    check_has_values(model, "evaluate_choices", offloaded=True)
    check_kinds(evaluate_choices, locals())
    if dense is not None:
        check_model(dense, "evaluate_choices", PreTrainedModel)
        check_has_values(dense, "evaluate_choices", offloaded=True)
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; wanted 1 or more.")
    check_tokenizer(tokenizer)
    examples = {name: found[:limit] for name, found in examples_of(tasks, data).items()}
    start = time.perf_counter()
    # Everything is read before anything is computed, so that a bad example is told at once.
    models = [model] if dense is None else [model, dense]
    asked = [
        {name: _requests(one, tokenizer, name, examples[name]) for name in examples}
        for one in models
    ]
    scores = [
        tuple(
            _scores(one, name, examples[name], requests, batch_size)
            for name, requests in own.items()
        )
        for one, own in zip(models, asked, strict=True)
    ]
    report = ChoiceReport(
        scores[0], () if dense is None else scores[1], time.perf_counter() - start
    )
    if isinstance(model, PreTrainedModel):
        record_metrics_(model, report.metrics)
    return report


def _requests(
    model: nn.Module, tokenizer: Any, task: str, examples: Sequence[Example]
) -> list[list[Request]]:
    """The requests of each example."""
    reader = Reader(model, tokenizer)
    return [
        [reader.request(*pair, f"task '{task}', example {number}") for pair in example.requests]
        for number, example in enumerate(examples, start=1)
    ]


def _scores(
    model: nn.Module,
    task: str,
    examples: Sequence[Example],
    requests: Sequence[Sequence[Request]],
    batch_size: int,
) -> TaskScores:
    flat = [request for own in requests for request in own]
    with switched(model, training=False):
        found = iter(likelihoods(model, flat, batch_size, task))
    by_example = [[next(found) for _ in own] for own in requests]
    return TaskScores.of(
        task,
        examples,
        by_example,
        normalised=task not in TASKS or TASKS[task].normalised,
        cut=sum(request.cut for request in flat),
    )
