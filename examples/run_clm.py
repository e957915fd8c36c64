# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_sparse[train]"]
#
# [tool.uv.sources]
# hf_sparse = { path = ".." }
# ///
"""Fine-tune a causal language model and make it sparse.

    python examples/run_clm.py --model_name_or_path gpt2 --dataset_name Salesforce/wikitext \\
        --dataset_config wikitext-2-raw-v1 --sparsity 0.5 --output_dir gpt2-sparse
    python examples/run_clm.py --model_name_or_path gpt2 --train_file train.txt \\
        --validation_file validation.txt --pattern 2:4 --output_dir gpt2-sparse

Files are plain text, or JSON lines with `text`. Texts are joined by the end-of-text token and cut
into windows of `--block_size` tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import sparsity
from transformers import AutoModelForCausalLM, Trainer, default_data_collator


@dataclass
class TextArguments(sparsity.DataArguments):
    """And how they are cut."""

    block_size: int = field(default=512, metadata={"help": "Tokens of a window."})


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Train, save and compare; returns the scores."""
    arguments, data, training = sparsity.parse(TextArguments, argv)
    raw = sparsity.load_splits(data)
    if "text" not in raw["train"].column_names:
        raise sparsity.WrongArgumentError(
            f"columns are {raw['train'].column_names}; wanted `text`."
        )
    if data.block_size < 2:
        raise sparsity.WrongArgumentError(f"--block_size is {data.block_size}; wanted 2 or more.")
    tokenizer = sparsity.load_tokenizer(arguments.model_name_or_path)

    def windows(rows: dict[str, list]) -> dict[str, list]:
        end = [tokenizer.eos_token_id]
        found = tokenizer(rows["text"], add_special_tokens=False)["input_ids"]
        tokens = list(chain.from_iterable(text + end for text in found))
        starts = range(0, len(tokens) - data.block_size + 1, data.block_size)
        cut = [tokens[start : start + data.block_size] for start in starts]
        return {"input_ids": cut, "labels": cut}

    splits = {}
    for name in ("train", "validation"):
        cut = raw[name].map(windows, batched=True, remove_columns=raw[name].column_names)
        if not len(cut):
            raise sparsity.WrongArgumentError(
                f"{name} has fewer than {data.block_size} tokens: lower --block_size, or give more."
            )
        splits[name] = sparsity.few(cut, arguments.smoke)

    def make_trainer(model: Any, **arguments: Any) -> Trainer:
        return Trainer(
            model,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            data_collator=default_data_collator,
            **{"args": training, **arguments},
        )

    def evaluate(trainer: Trainer) -> dict[str, float]:
        loss = trainer.evaluate()["eval_loss"]
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf}

    task = sparsity.Task(AutoModelForCausalLM, make_trainer, evaluate, tokenizer)
    return sparsity.compare(arguments, training, task)


if __name__ == "__main__":
    sparsity.run(main)
