# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_sparse"]
#
# [tool.uv.sources]
# hf_sparse = { path = ".." }
# ///
"""Sparse training in a loop of one's own, with Accelerate on one or many processes.

    accelerate launch examples/accelerate_loop.py --model gpt2 --text train.txt --output gpt2-sparse

Three lines differ from a dense loop: the param groups, the optimizer, and `sparsifier.step()`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Hub name or folder")
    parser.add_argument("--text", required=True, type=Path, help="file of plain text")
    parser.add_argument("--output", required=True, help="folder for the sparse model")
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--window", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences per process and step")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step")
    parser.add_argument("--lr", type=float, default=2e-4)
    options = parser.parse_args()

from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import hf_sparse
from hf_sparse import SparseAdamW, Sparsifier, SparsityConfig, sparse_param_groups


def main(options: argparse.Namespace) -> None:
    """Train a causal language model sparse."""
    config = SparsityConfig(options.pattern, options.sparsity)

    accelerator = Accelerator(gradient_accumulation_steps=options.accumulate)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokens = tokenizer(options.text.read_text(), return_tensors="pt", verbose=False)["input_ids"][0]
    if options.window < 2 or len(tokens) < options.window:
        raise ValueError(
            f"the text has {len(tokens)} tokens, --window is {options.window}; wanted at least one "
            "window of 2 tokens or more."
        )
    windows = list(
        tokens[: len(tokens) // options.window * options.window].view(-1, options.window)
    )

    groups = sparse_param_groups(model, config, weight_decay=0.01)
    optimizer = SparseAdamW(groups, lr=options.lr, penalty="l0", scale="adaptive")
    scheduler = get_scheduler("linear", optimizer, options.steps // 10, options.steps)
    loader = DataLoader(windows, batch_size=options.batch, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    sparsifier = Sparsifier(optimizer, config, options.steps)

    model.train()
    while sparsifier.steps < options.steps:
        for ids in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=ids, labels=ids).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
                sparsifier.step()
                if sparsifier.steps == options.steps:
                    break
    sparsifier.check()
    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(model)
        report = sparsifier.report(trained)
        hf_sparse.save_pretrained(
            trained, options.output, config, tokenizer=tokenizer, report=report
        )
    accelerator.print(f"sparsity {sparsifier.sparsity:.4f}, saved to {options.output}")


if __name__ == "__main__":
    main(options)
