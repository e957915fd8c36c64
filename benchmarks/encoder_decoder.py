"""Encoders with decoders: T5 and BART, random weights in the sizes of real ones, compiled and by torch.

    python benchmarks/encoder_decoder.py                     T5-small's and BART-base's sizes

Pruned by magnitude, unstructured. For each, in turns: torch; its layers compiled one by one; the two
stacks compiled with all their weights; and with the zeros. Medians, ms: the encoder alone, `--tokens`
tokens, and a new token of greedy `generate` behind the encoder, prompt and first token left out.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=128, help="of the encoder")
    parser.add_argument("--new", type=int, default=24, help="tokens of the decoder")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--models", nargs="+", default=["t5-small", "bart-base"])
    args = parser.parse_args()

import torch
from real_models import machine
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

import hf_sparse
from hf_sparse.counts import format_table
from hf_sparse.runtime.llvm.jit import DEFAULT_CACHE
from hf_sparse.runtime.llvm.target import host
from hf_sparse.runtime.model.layer_by_layer import with_compiled_layers


def config_of(name: str) -> PreTrainedConfig:
    """The sizes of google-t5/t5-small and facebook/bart-base, as their papers tell them."""
    if name == "t5-small":
        sizes: dict[str, Any] = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8}
        return T5Config(vocab_size=32128, num_layers=6, decoder_start_token_id=0, **sizes)
    stacks = {
        f"{stack}_{size}": number
        for stack in ("encoder", "decoder")
        for size, number in {"layers": 6, "attention_heads": 12, "ffn_dim": 3072}.items()
    }
    return BartConfig(vocab_size=50265, d_model=768, forced_eos_token_id=None, **stacks)


def versions(name: str, sparsity: float) -> dict[str, PreTrainedModel]:
    """The models that take turns."""
    torch.manual_seed(0)
    dense = AutoModelForSeq2SeqLM.from_config(config_of(name)).eval()
    pruned = copy.deepcopy(dense)
    zeros = hf_sparse.SparsityConfig("unstructured", sparsity)
    hf_sparse.prune_(pruned, zeros, "magnitude")
    layers = with_compiled_layers(pruned, "it was asked for", host(), DEFAULT_CACHE)
    return {
        "torch": dense,
        "layer by layer": layers.eval(),
        "two stacks, all weights": hf_sparse.compile(dense),
        f"two stacks, {100 * sparsity:.0f} % zeros": hf_sparse.compile(pruned),
    }


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def times_of(models: dict[str, PreTrainedModel], options: argparse.Namespace) -> list[tuple]:
    """A row for each: medians of the encoder and of a new token, ms."""
    ids = torch.randint(3, 30000, (1, options.tokens), generator=torch.Generator().manual_seed(0))
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    for repeat in range(options.repeats + 1):
        for name, model in models.items():
            encoder = seconds(lambda model=model: model.get_encoder()(ids))
            spent = [
                seconds(
                    lambda model=model, count=count: model.generate(
                        ids, max_new_tokens=count, min_new_tokens=count, do_sample=False
                    )
                )
                for count in (1, options.new + 1)
            ]
            if repeat:  # the first call makes programs
                found[name][0].append(1e3 * encoder)
                found[name][1].append(1e3 * (spent[1] - spent[0]) / options.new)
    medians = {name: tuple(map(statistics.median, each)) for name, each in found.items()}
    first = medians["torch"]
    return [
        (name, *(f"{ms:.2f} ({base / ms:.2f}x)" for ms, base in zip(each, first, strict=True)))
        for name, each in medians.items()
    ]


def main() -> None:
    """Print a table for each model."""
    torch.set_num_threads(args.threads)
    print(machine())
    for name in args.models:
        rows = times_of(versions(name, args.sparsity), args)
        print(f"\n{name}'s sizes, fp32, ms, over torch in brackets, seed 0")
        print(format_table(("", f"encoder, 1 x {args.tokens}", "a new token"), rows))


if __name__ == "__main__":
    main()
