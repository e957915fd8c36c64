"""Statistics of each expert's own tokens against statistics of all tokens, on a real mixture.

    python benchmarks/real_mixture.py MIXTURE --data FOLDER    # made from SmolLM2-135M, once
    python benchmarks/experts.py MIXTURE --data FOLDER         # WikiText-2 and C4
    python benchmarks/experts.py MIXTURE                       # prose that Python ships

The experts of the mixture are pruned to 2:4 twice by each method: as hf_sparse does, and with what all
tokens would give to every expert, as if no router chose. Prints held-out perplexity of the mixture, and
of both prunings.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("mixture", type=Path, help="folder that real_mixture.py wrote")
    parser.add_argument(
        "--data", type=Path, help="folder with WikiText-2 and C4, see real_models.py"
    )
    parser.add_argument("--windows", type=int, default=16, help="for calibration, of 512 tokens")
    parser.add_argument("--held-out", type=int, default=8, help="windows to measure on")
    parser.add_argument("--texts", nargs="+", help="which of the texts to measure on (default all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    options = parser.parse_args()

import torch
from real_mixture import perplexity
from real_models import machine, texts
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.calibration import layer_inputs
from hf_sparse.counts import format_table


def main(options: argparse.Namespace) -> None:
    """Prune the mixture both ways, and print perplexities."""
    torch.set_num_threads(options.threads)
    print(machine(), flush=True)
    tokenizer = AutoTokenizer.from_pretrained(options.mixture)
    mixture = AutoModelForCausalLM.from_pretrained(options.mixture, dtype=torch.float32).eval()
    calibration, held_out = texts(options.data)
    names = options.texts or list(held_out)
    batches = hf_sparse.calibration_batches(
        tokenizer, calibration, num_samples=options.windows, window=512
    )
    measured = [
        hf_sparse.calibration_batches(
            tokenizer, held_out[name], num_samples=options.held_out, window=512
        )
        for name in names
    ]

    def row(name: str, model: Any, seconds: float) -> tuple[str, ...]:
        found = [f"{perplexity(model, windows):.2f}" for windows in measured]
        print(f"{name}: {', '.join(found)}", flush=True)
        return (name, *found, f"{seconds:.0f}")

    rows = [row("mixture", mixture, 0.0)]
    config = SparsityConfig("2:4", targets="experts.*")
    for method in options.methods:
        for name, seen in (("their own tokens", None), ("all tokens", every_token)):
            model, start = copy.deepcopy(mixture), time.process_time()
            with mock.patch.object(layer_inputs, "routed", seen or layer_inputs.routed):
                hf_sparse.prune_(model, config, method, batches)
            rows.append(row(f"{method} 2:4, {name}", model, time.process_time() - start))
    head = ("model", *(f"perplexity, {name}" for name in names), "CPU seconds")
    print(format_table(head, rows))


def every_token(
    stack: Any, args: Any, kwargs: Any, masks: Any
) -> Callable[[int], tuple[Tensor, None]]:
    """In the place of `routed`: every expert sees all tokens."""
    inputs = masks.counted(args[0].detach())
    return lambda expert: (inputs, None)


if __name__ == "__main__":
    main(options)
