# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_sparse[train]"]
#
# [tool.uv.sources]
# hf_sparse = { path = ".." }
# ///
"""Fine-tune a classifier (or a regressor) and make it sparse: GLUE and anything of its shape.

    python examples/run_glue.py --model_name_or_path bert-base-uncased --dataset_name nyu-mll/glue \\
        --dataset_config sst2 --sparsity 0.8 --output_dir bert-sst2-sparse --learning_rate 5e-5
    python examples/run_glue.py --model_name_or_path bert-base-uncased --train_file train.jsonl \\
        --validation_file validation.jsonl --pattern block:4x1 --sparsity 0.7 --output_dir out

Files are JSON lines or CSV with `label` (whole numbers are classes, numbers with a fraction values to
regress) and one or two columns of text, named as in GLUE: `sentence`, or
`sentence1` and `sentence2`, ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sparsity
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer

try:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import matthews_corrcoef
except ImportError as error:
    raise SystemExit("scipy and scikit-learn are needed: pip install 'hf_sparse[train]'") from error

# The text columns of GLUE's tasks and of most others.
TEXTS = [
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
]


@dataclass
class TextArguments(sparsity.DataArguments):
    """And how they are cut."""

    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut."})


def count_labels(raw: Any) -> int:
    """The number of classes; 1 for values to regress."""
    found = {label for split in ("train", "validation") for label in raw[split]["label"]}
    if found and all(isinstance(label, float) and label == label for label in found):
        return 1
    if len(found) > 1 and found == set(range(len(found))) and bool not in map(type, found):
        return len(found)
    raise sparsity.WrongArgumentError(
        f"labels are {sorted(map(str, found))[:10]}; wanted the classes 0, 1, ... (two or more, whole "
        "numbers), or numbers with a fraction to regress, and none missing."
    )


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Train, save and compare; returns the scores."""
    arguments, data, training = sparsity.parse(TextArguments, argv)
    raw = sparsity.load_splits(data)
    columns = raw["train"].column_names
    texts = next((names for names in TEXTS if set(names) <= set(columns)), None)
    if "label" not in columns or texts is None:
        known = "; ".join(" and ".join(names) for names in TEXTS)
        raise sparsity.WrongArgumentError(
            f"columns are {columns}; wanted `label`, and one of these: {known}."
        )
    labels = count_labels(raw)
    regression = labels == 1
    tokenizer = sparsity.load_tokenizer(arguments.model_name_or_path)

    def tokenize(rows: dict[str, list]) -> dict[str, Any]:
        found = tokenizer(
            *(rows[name] for name in texts), truncation=True, max_length=data.max_seq_length
        )
        return {**found, "label": rows["label"]}

    names = raw["train"].column_names
    splits = {
        name: sparsity.few(raw[name], arguments.smoke).map(
            tokenize, batched=True, remove_columns=names
        )
        for name in ("train", "validation")
    }

    def score(prediction: Any) -> dict[str, float]:
        logits, wanted = prediction.predictions, prediction.label_ids
        if regression:
            found = logits[:, 0]
            return {"pearson": pearsonr(found, wanted)[0], "spearman": spearmanr(found, wanted)[0]}
        found = logits.argmax(axis=1)
        return {
            "accuracy": float(np.mean(found == wanted)),
            "matthews": matthews_corrcoef(wanted, found),
        }

    def make_trainer(model: Any, **arguments: Any) -> Trainer:
        return Trainer(
            model,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=score,
            **{"args": training, **arguments},
        )

    def evaluate(trainer: Trainer) -> dict[str, float]:
        found = trainer.evaluate()
        chosen = ("pearson", "spearman") if regression else ("accuracy", "matthews")
        return {name: float(found[f"eval_{name}"]) for name in chosen}

    task = sparsity.Task(
        AutoModelForSequenceClassification,
        make_trainer,
        evaluate,
        tokenizer,
        {"num_labels": labels},
    )
    return sparsity.compare(arguments, training, task)


if __name__ == "__main__":
    sparsity.run(main)
