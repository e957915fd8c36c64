# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_sparse[train]"]
#
# [tool.uv.sources]
# hf_sparse = { path = ".." }
# ///
"""Fine-tune a multiple-choice model and make it sparse: RACE and anything of its layout.

    python examples/run_multiple_choice.py --model_name_or_path albert-base-v2 \\
        --dataset_name ehovy/race --dataset_config middle --sparsity 0.8 --output_dir albert-race-sparse
    python examples/run_multiple_choice.py --model_name_or_path albert-base-v2 \\
        --train_file train.jsonl --validation_file validation.jsonl --pattern 2:4 --output_dir out

Files are JSON lines with `article`, `question`, `options` (the same number in every line) and
`answer` (A, B, ...). A question with a gap `_` is filled by the option, as in RACE.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sparsity
from transformers import AutoModelForMultipleChoice, DataCollatorForMultipleChoice, Trainer


@dataclass
class QuestionArguments(sparsity.DataArguments):
    """And how they are cut."""

    max_seq_length: int = field(default=512, metadata={"help": "Longer articles are cut."})


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Train, save and compare; returns the scores."""
    arguments, data, training = sparsity.parse(QuestionArguments, argv)
    raw = sparsity.load_splits(data)
    if missing := {"article", "question", "options", "answer"} - set(raw["train"].column_names):
        raise sparsity.WrongArgumentError(
            f"columns {sorted(missing)} are missing; wanted the layout of RACE."
        )
    counts = {
        len(options) for split in ("train", "validation") for options in raw[split]["options"]
    }
    letters = {chr(ord("A") + number) for number in range(min(counts, default=0))}
    answers = {answer for split in ("train", "validation") for answer in raw[split]["answer"]}
    if len(counts) != 1 or not answers <= letters:
        raise sparsity.WrongArgumentError(
            f"questions have {sorted(counts)} options, answers are {sorted(map(str, answers))[:9]}; "
            "wanted the same number of options everywhere, and letters from A on."
        )
    tokenizer = sparsity.load_tokenizer(arguments.model_name_or_path)

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        question, options = row["question"], row["options"]
        filled = [
            question.replace("_", option) if "_" in question else f"{question} {option}"
            for option in options
        ]
        found = tokenizer(
            [row["article"]] * len(options),
            filled,
            truncation="only_first",
            max_length=data.max_seq_length,
        )
        return {**found, "label": ord(row["answer"]) - ord("A")}

    splits = {
        name: sparsity.few(raw[name], arguments.smoke).map(
            tokenize, remove_columns=raw[name].column_names
        )
        for name in ("train", "validation")
    }

    def make_trainer(model: Any, **arguments: Any) -> Trainer:
        return Trainer(
            model,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            data_collator=DataCollatorForMultipleChoice(tokenizer),
            compute_metrics=lambda found: {
                "accuracy": np.mean(found.predictions.argmax(axis=1) == found.label_ids)
            },
            **{"args": training, **arguments},
        )

    def evaluate(trainer: Trainer) -> dict[str, float]:
        return {"accuracy": float(trainer.evaluate()["eval_accuracy"])}

    task = sparsity.Task(AutoModelForMultipleChoice, make_trainer, evaluate, tokenizer)
    return sparsity.compare(arguments, training, task)


if __name__ == "__main__":
    sparsity.run(main)
