# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_sparse"]
#
# [tool.uv.sources]
# hf_sparse = { path = ".." }
# ///
"""Fine-tune a pruned language model in Trainer; its zeros stay zero.

    python examples/recover_finetune.py SPARSE OUTPUT --data train.jsonl --held-out wikitext.txt \
        --teacher DENSE

SPARSE is a folder that `hf_sparse.save_pretrained` wrote, or a Hub name. What keeps the zeros is one
callback, `KeepZeros`. With `--teacher` the model also learns from the dense model's logits.
"""

from __future__ import annotations

import argparse

import language_models

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    language_models.add_recovery(parser)
    parser.add_argument("--lr", type=float, default=3e-4)
    options = parser.parse_args()

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import hf_sparse


def main(options: argparse.Namespace) -> None:
    """Train, check, compare, save."""
    tokenizer = AutoTokenizer.from_pretrained(options.sparse)
    model = AutoModelForCausalLM.from_pretrained(options.sparse, dtype=torch.float32)
    before = hf_sparse.measure_sparsity(model)
    pruned = language_models.perplexity(options, model, tokenizer)
    language_models.attach_teacher(options, model)
    trainer = Trainer(
        model,
        language_models.training_arguments(options),
        train_dataset=language_models.rows(options, tokenizer),
        callbacks=[hf_sparse.KeepZeros()],
    )
    trainer.train()
    after = hf_sparse.measure_sparsity(model)
    recovered = language_models.perplexity(options, model, tokenizer)
    print(f"zeros: {before.zeros:,} before, {after.zeros:,} after")
    print(f"perplexity, {options.held_out.name}: pruned {pruned:.2f}, recovered {recovered:.2f}")
    hf_sparse.save_pretrained(model, options.output, tokenizer=tokenizer)
    print(f"saved to {options.output}")


if __name__ == "__main__":
    main(options)
