"""Prune a causal language model in one shot, compare it with the dense one, and save it.

    python examples/prune_llm.py MODEL OUTPUT --calibration c4.jsonl --held-out wikitext.txt \
        --pattern 2:4 --method alps --reconstruct 2

MODEL is a folder or a Hub name. Under `accelerate launch` the processes share the calibration data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_sparse_cli.choices import ALLOCATIONS, METHODS

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder or Hub name of the dense model")
    parser.add_argument("output", help="folder for the sparse model")
    parser.add_argument("--calibration", type=Path, required=True, help=".jsonl or plain text")
    parser.add_argument("--held-out", type=Path, required=True, help="text to measure on")
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--sparsity", type=float, help="fraction of zeros; N:M fixes it")
    parser.add_argument("--method", default="alps", choices=METHODS)
    parser.add_argument("--allocation", default="uniform", choices=ALLOCATIONS)
    parser.add_argument("--refine", choices=["swaps"])
    parser.add_argument("--reconstruct", type=int, default=0, metavar="EPOCHS")
    parser.add_argument("--num-samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    parser.add_argument("--max-windows", type=int, default=32, help="windows to measure on")
    options = parser.parse_args()

from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.calibration.documents import read_documents


def main(options: argparse.Namespace) -> None:
    """Prune, measure, save."""
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    config = hf_sparse.SparsityConfig(options.pattern, options.sparsity)
    held_out = options.held_out.read_text()

    def measure() -> float:
        return hf_sparse.perplexity(
            model, tokenizer, held_out, options.window, max_windows=options.max_windows
        )

    dense = measure()
    batches = hf_sparse.calibration_batches(
        tokenizer,
        read_documents([options.calibration]),
        num_samples=options.num_samples,
        window=options.window,
    )
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
    metric = hf_sparse.Metric(f"perplexity, {options.held_out.name}", measure(), dense)
    print(report.summary())
    print(f"{metric.name}: dense {metric.dense:.2f}, sparse {metric.sparse:.2f}")
    hf_sparse.save_pretrained(
        model, options.output, config, tokenizer=tokenizer, report=report, metrics=[metric]
    )
    print(f"saved to {options.output}")


if __name__ == "__main__":
    main(options)
