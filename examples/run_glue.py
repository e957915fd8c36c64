"""Fine-tune a classifier (or a regressor) and make it sparse: GLUE and anything of its shape.

    python examples/run_glue.py --model_name_or_path bert-base-uncased --dataset_name nyu-mll/glue \\
        --dataset_config sst2 --sparsity 0.8 --output_dir bert-sst2-sparse --learning_rate 5e-5
    python examples/run_glue.py --model_name_or_path bert-base-uncased --train_file train.jsonl \\
        --validation_file validation.jsonl --pattern block:4x1 --sparsity 0.7 --output_dir out

Files are JSON lines or CSV with `label` (a whole number is a class, any other number a value to
regress) and one or two columns of text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import matthews_corrcoef
from sparsity import DataArguments, Task, compare, few, load, load_splits, load_tokenizer, parse
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer


@dataclass
class TextArguments(DataArguments):
    """And how they are cut."""

    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut."})


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Train, save and compare; returns the scores."""
    sparsity, data, training = parse(TextArguments, argv)
    raw = load_splits(data)
    columns = raw["train"].features
    texts = [name for name, kind in columns.items() if kind.dtype in ("string", "large_string")]
    if "label" not in columns or not 1 <= len(texts) <= 2:
        raise ValueError(f"columns are {list(columns)}; wanted `label` and one or two of text.")
    regression = columns["label"].dtype.startswith("float")
    labels = 1 if regression else len(set(raw["train"]["label"]))
    tokenizer = load_tokenizer(sparsity.model_name_or_path)

    def tokenize(rows: dict[str, list]) -> dict[str, Any]:
        found = tokenizer(
            *(rows[name] for name in texts), truncation=True, max_length=data.max_seq_length
        )
        return {**found, "label": rows["label"]}

    names = raw["train"].column_names
    splits = {
        name: few(raw[name], sparsity.smoke).map(tokenize, batched=True, remove_columns=names)
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
            training,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=score,
            **arguments,
        )

    def evaluate(trainer: Trainer) -> dict[str, float]:
        found = trainer.evaluate()
        chosen = ("pearson", "spearman") if regression else ("accuracy", "matthews")
        return {name: float(found[f"eval_{name}"]) for name in chosen}

    task = Task(
        AutoModelForSequenceClassification,
        lambda path: load(AutoModelForSequenceClassification, path, num_labels=labels),
        make_trainer,
        evaluate,
        tokenizer,
    )
    return compare(sparsity, training, task)


if __name__ == "__main__":
    main()
