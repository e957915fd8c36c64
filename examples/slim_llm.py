# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_sparse"]
#
# [tool.uv.sources]
# hf_sparse = { path = ".." }
# ///
"""A plain smaller language model for one budget: fewer and smaller blocks, healed by the whole model.

    python examples/slim_llm.py MODEL OUTPUT --data train.jsonl --held-out wikitext.txt --params 0.7

OUTPUT is a checkpoint of the family's own type: it loads where hf_sparse is not installed. `--ms 0.6x`
asks for a time instead of a number of weights.
"""

from __future__ import annotations

import argparse

import language_models

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder or Hub name of the whole model")
    parser.add_argument("output", help="folder for the smaller model")
    language_models.add_texts(parser, samples=256)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--params", type=float, help="share of the weights, such as 0.7")
    budget.add_argument("--ms", help="share of the time of a forward pass, such as 0.6x")
    parser.add_argument("--search", type=int, default=8, help="windows that the search looks at")
    parser.add_argument("--lr", type=float, default=3e-4)
    options = parser.parse_args()

import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse


def main(options: argparse.Namespace) -> None:
    """Search, print the plan, make the model smaller, train it, compare, save."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = copy.deepcopy(teacher)
    windows = language_models.windows(options, tokenizer)

    def measure(what: str, one: torch.nn.Module) -> None:
        value = language_models.perplexity(options, one, tokenizer)
        print(f"perplexity, {what}: {value:.2f}")

    measure("whole", teacher)
    plan = hf_sparse.plan_slim(
        model, windows[: options.search], params=options.params, ms=options.ms
    )
    print(plan)
    report = hf_sparse.slim_(model, plan=plan)
    print(report.summary())
    measure("smaller", model)
    hf_sparse.recover_(model, windows, teacher=teacher, lr=options.lr)
    measure("trained", model)
    hf_sparse.save_pretrained(model, options.output, tokenizer=tokenizer)


if __name__ == "__main__":
    main(options)
