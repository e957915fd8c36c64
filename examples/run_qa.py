# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_sparse[train]"]
#
# [tool.uv.sources]
# hf_sparse = { path = ".." }
# ///
"""Fine-tune an extractive question answering model and make it sparse: SQuAD 1.1 and 2.0.

    python examples/run_qa.py --model_name_or_path bert-base-uncased --dataset_name rajpurkar/squad \\
        --sparsity 0.8 --output_dir bert-squad-sparse --learning_rate 5e-5
    python examples/run_qa.py --model_name_or_path bert-base-uncased --train_file train-v2.0.json \\
        --validation_file dev-v2.0.json --pattern block:4x1 --sparsity 0.7 --output_dir out

Files have SQuAD's own layout (data, paragraphs, qas). Questions without an answer (2.0) are
answered by the empty string where the first token beats every span.
"""

from __future__ import annotations

import collections
import json
import re
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sparsity
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, Trainer

try:
    from datasets import Dataset
except ImportError as error:
    raise SystemExit("datasets is needed: pip install 'hf_sparse[train]'") from error

BEST = 20  # starts and ends that are paired
LONGEST_ANSWER = 30  # tokens


@dataclass
class QuestionArguments(sparsity.DataArguments):
    """And how they are cut."""

    max_seq_length: int = field(default=384, metadata={"help": "Tokens of a window."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that two windows share."})


def read_squad(path: str) -> Dataset:
    """The questions of a file, one row each."""
    rows = []
    for article in json.loads(Path(path).read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = [] if question.get("is_impossible") else question["answers"]
                rows.append(
                    {
                        "id": str(question["id"]),
                        "context": paragraph["context"],
                        "question": question["question"],
                        "answers": {
                            "text": [answer["text"] for answer in answers],
                            "answer_start": [answer["answer_start"] for answer in answers],
                        },
                    }
                )
    return Dataset.from_list(rows)


def windows(rows: dict[str, list], tokenizer: Any, data: QuestionArguments) -> Any:
    """Cut contexts into windows; with each go its row, offsets and which tokens are context."""
    found = tokenizer(
        [question.strip() for question in rows["question"]],
        rows["context"],
        truncation="only_second",
        max_length=data.max_seq_length,
        stride=data.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    found["row"] = found.pop("overflow_to_sample_mapping")
    found["offsets"] = [
        [
            offset if part == 1 else None
            for offset, part in zip(offsets, found.sequence_ids(i), strict=True)
        ]
        for i, offsets in enumerate(found.pop("offset_mapping"))
    ]
    return found


def training_windows(rows: dict[str, list], tokenizer: Any, data: QuestionArguments) -> Any:
    """Windows with the tokens where the answer starts and ends; the first token where it is not."""
    found = windows(rows, tokenizer, data)
    starts, ends = [], []
    for row, offsets in zip(found.pop("row"), found.pop("offsets"), strict=True):
        answers, start, end = rows["answers"][row], 0, 0
        if answers["text"]:
            first = answers["answer_start"][0]
            last = first + len(answers["text"][0])
            inside = [
                token
                for token, span in enumerate(offsets)
                if span and span[0] < last and span[1] > first
            ]
            covered = [offsets[token] for token in inside]
            if inside and covered[0][0] <= first and covered[-1][1] >= last:
                start, end = inside[0], inside[-1]
        starts.append(start)
        ends.append(end)
    return {**found, "start_positions": starts, "end_positions": ends}


def best_answers(rows: Any, features: Any, starts: np.ndarray, ends: np.ndarray) -> list[str]:
    """The best span of each question over its windows, or the empty answer."""
    best: dict[int, tuple[float, str]] = collections.defaultdict(lambda: (-np.inf, ""))
    empty: dict[int, float] = collections.defaultdict(lambda: np.inf)
    for feature, start, end in zip(features, starts, ends, strict=True):
        row, offsets = feature["row"], feature["offsets"]
        empty[row] = min(empty[row], float(start[0] + end[0]))
        for first in np.argsort(start[: len(offsets)])[-BEST:]:
            for last in np.argsort(end[: len(offsets)])[-BEST:]:
                if (
                    not offsets[first]
                    or not offsets[last]
                    or not 0 <= last - first < LONGEST_ANSWER
                ):
                    continue
                value = float(start[first] + end[last])
                if value > best[row][0]:
                    text = rows[row]["context"][offsets[first][0] : offsets[last][1]]
                    best[row] = (value, text)
    without = any(not row["answers"]["text"] for row in rows)  # SQuAD 2.0
    return [
        "" if without and empty[row] > best[row][0] else best[row][1] for row in range(len(rows))
    ]


def normalize(text: str) -> list[str]:
    """The words of an answer without case, punctuation and articles, as SQuAD's scorer has it."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def squad_scores(found: list[str], answers: list[list[str]]) -> dict[str, float]:
    """Exact match and F1 in percent: the best over the given answers of each question."""
    exact, overlap = [], []
    for text, wanted in zip(found, answers, strict=True):
        words = normalize(text)
        references = [normalize(answer) for answer in wanted] or [[]]
        exact.append(max(words == reference for reference in references))
        overlap.append(max(_f1(words, reference) for reference in references))
    return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(overlap))}


def _f1(words: list[str], reference: list[str]) -> float:
    if not words or not reference:
        return float(words == reference)
    shared = sum((collections.Counter(words) & collections.Counter(reference)).values())
    return 2 * shared / (len(words) + len(reference))


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Train, save and compare; returns the scores."""
    arguments, data, training = sparsity.parse(QuestionArguments, argv)
    if not 0 <= data.doc_stride <= data.max_seq_length // 2:
        raise sparsity.WrongArgumentError(
            f"--doc_stride is {data.doc_stride}; wanted at most half of --max_seq_length, "
            f"{data.max_seq_length // 2}."
        )
    raw = sparsity.load_splits(data, read_squad)
    tokenizer = sparsity.load_tokenizer(arguments.model_name_or_path)
    if not tokenizer.is_fast:
        raise sparsity.WrongArgumentError(
            "the tokenizer is a slow one, without offsets; wanted a fast tokenizer."
        )
    train, validation = (
        sparsity.few(raw["train"], arguments.smoke),
        sparsity.few(raw["validation"], arguments.smoke),
    )
    features = train.map(
        training_windows,
        batched=True,
        remove_columns=train.column_names,
        fn_kwargs={"tokenizer": tokenizer, "data": data},
    )
    questions = Dataset.from_dict(dict(windows(validation[:], tokenizer, data)))
    inputs = questions.remove_columns(["row", "offsets"])

    def make_trainer(model: Any, **arguments: Any) -> Trainer:
        collator = DataCollatorWithPadding(tokenizer)
        settings = {"args": training, **arguments}
        return Trainer(model, train_dataset=features, data_collator=collator, **settings)

    def evaluate(trainer: Trainer) -> dict[str, float]:
        starts, ends = trainer.predict(inputs).predictions[:2]
        found = best_answers(list(validation), questions, starts, ends)
        return squad_scores(found, [row["text"] for row in validation["answers"]])

    task = sparsity.Task(AutoModelForQuestionAnswering, make_trainer, evaluate, tokenizer)
    return sparsity.compare(arguments, training, task)


if __name__ == "__main__":
    sparsity.run(main)
