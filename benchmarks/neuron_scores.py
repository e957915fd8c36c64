"""Scores of feed-forward neurons, as `slim_` ranks them: perplexity of SmolLM2-135M without the lowest.

    python benchmarks/neuron_scores.py --data FOLDER    # WikiText-2 and C4, see real_models.texts
    python benchmarks/neuron_scores.py                  # prose that Python ships

As many neurons of each block go, by the norm of their activations (2SSP's rule,
https://arxiv.org/abs/2501.17771, over all tokens), and by that norm times the norm of their column
(Wanda's, https://arxiv.org/abs/2306.11695). Nothing is trained. Where the CPU multiplies bfloat16, the
model is in it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder with WikiText-2 and C4 texts")
    parser.add_argument("--kept", type=int, default=1008, help="neurons of 1,536 that stay")
    parser.add_argument("--windows", type=int, default=8, help="to score on")
    parser.add_argument("--window", type=int, default=512, help="tokens of each")
    parser.add_argument("--max-windows", type=int, default=8, help="of 512 tokens, to measure on")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

import torch
from real_models import dense_smollm2, faster, machine, texts
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.calibration.sensitivity import input_norms
from hf_sparse.slimming.width import Ranking, without_units
from hf_sparse.structure.parts import BlockSize
from hf_sparse.structure.units import find_units


@torch.no_grad()
def main(options: argparse.Namespace) -> None:
    """Score, and print the perplexity without the neurons of lowest score."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = dense_smollm2(Path(temporary))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=faster()).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration, held_out = texts(options.data)
    batches = hf_sparse.calibration_batches(
        tokenizer, calibration, num_samples=options.windows, window=options.window
    )
    print(f"{machine()}; {options.windows} x {options.window} tokens, {faster()}", flush=True)
    blocks = find_units(model)
    norms = input_norms(model, [units.down for units in blocks], batches)
    activations = [norms[units.down.name].float() for units in blocks]
    columns = [units.down.weight.float().norm(dim=0) for units in blocks]
    scores = {
        "activations": activations,
        "activations x column": [a * b for a, b in zip(activations, columns, strict=True)],
    }
    size = blocks[0].size
    left = BlockSize(size.heads, size.key_heads, options.kept)
    for name, own in scores.items():
        ranking = ranked(own, size)
        with without_units(blocks, ranking, left):
            found = {
                text: round(
                    hf_sparse.perplexity(
                        model, tokenizer, told, 512, max_windows=options.max_windows
                    ),
                    2,
                )
                for text, told in held_out.items()
            }
        print(f"{options.kept} of {size.neurons} neurons by {name}: {found}", flush=True)


def ranked(scores: list[Tensor], size: Any) -> Ranking:
    """All heads, and the neurons of highest score first."""
    groups = tuple(torch.arange(size.key_heads) for _ in scores)
    neurons = tuple(own.argsort(descending=True, stable=True) for own in scores)
    return Ranking(groups, neurons, size.heads // size.key_heads)


if __name__ == "__main__":
    main(options)
