# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_sparse"]
#
# [tool.uv.sources]
# hf_sparse = { path = ".." }
# ///
"""Prune a causal language model in one shot, compare it with the dense one, and save it.

    python examples/prune_llm.py MODEL OUTPUT --calibration c4.jsonl --held-out wikitext.txt \
        --pattern 2:4 --method alps --reconstruct 2

MODEL is a folder or a Hub name. Under `accelerate launch` the processes share the calibration data.
"""

from __future__ import annotations

import argparse

import language_models

from hf_sparse_cli.choices import ALLOCATIONS, METHODS

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder or Hub name of the dense model")
    parser.add_argument("output", help="folder for the sparse model")
    language_models.add_texts(parser, samples=64, data="--calibration")
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--sparsity", type=float, help="fraction of zeros; N:M fixes it")
    parser.add_argument("--method", default="alps", choices=METHODS)
    parser.add_argument("--allocation", default="uniform", choices=ALLOCATIONS)
    parser.add_argument("--refine", choices=["swaps"])
    parser.add_argument("--reconstruct", type=int, default=0, metavar="EPOCHS")
    options = parser.parse_args()

from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse


def main(options: argparse.Namespace) -> None:
    """Prune, measure, save."""
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    config = hf_sparse.SparsityConfig(options.pattern, options.sparsity)
    dense = language_models.perplexity(options, model, tokenizer)
    batches = language_models.windows(options, tokenizer)
    report = hf_sparse.prune_(
        model,
        config,
        options.method,
        batches,
        accelerator=accelerator,
        allocation=options.allocation,
        refine=options.refine,
        reconstruct=options.reconstruct,
    )
    if not accelerator.is_main_process:
        return
    sparse = language_models.perplexity(options, model, tokenizer)
    metric = hf_sparse.Metric(f"perplexity, {options.held_out.name}", sparse, dense)
    print(report.summary())
    print(f"{metric.name}: dense {metric.dense:.2f}, sparse {metric.sparse:.2f}")
    hf_sparse.save_pretrained(
        model, options.output, config, tokenizer=tokenizer, report=report, metrics=[metric]
    )
    print(f"saved to {options.output}")


if __name__ == "__main__":
    main(options)
