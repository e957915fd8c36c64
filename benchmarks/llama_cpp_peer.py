"""SmolLM2-135M in llama.cpp and compiled, with the same codes: a token, and a prompt of 128, in turns.

    python -m venv LLAMA && LLAMA/bin/pip install llama-cpp-python    # compiles llama.cpp
    python benchmarks/llama_cpp_peer.py --python LLAMA/bin/python

Q8_0 and Q4_0 are the GGUF files that `export_gguf` writes of the model that `quantize_` makes; the
compiled models have the same codes, and 2:4 ones codes of magnitude pruning (their quality is not
the subject here). Decoding: ms of a token of greedy search, the mean of 64 behind a prompt of 32. All
models take turns in one run; the least and the median of the turns are printed.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--python", required=True, help="of an environment with llama-cpp-python")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", help="of the compiled models; this CPU's best by default")
    parser.add_argument("--work", type=Path, default=Path("bench_output"))
    options = parser.parse_args()

import torch
from real_models import dense_smollm2, machine
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.counts import format_table

TOKENS, PROMPT, LONG = 64, 32, 128
# Turns a request such as ("decode", 64) into milliseconds.
Timed = Callable[[str, int], float]


def main(options: argparse.Namespace) -> None:
    """Measure all in turns, and print."""
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    folder = options.work / "smollm2"
    if not (folder / "config.json").exists():
        dense_smollm2(folder)
    print(f"{machine()}; {options.threads} threads; load {os.getloadavg()[0]:.1f}", flush=True)
    peers = models(folder, options)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.turns):
        for name, timed in peers.items():
            for kind, number in (("decode", TOKENS), ("prompt", LONG)):
                times.setdefault((name, kind), []).append(timed(kind, number))
    rows = [
        (
            name,
            *(
                figure
                for kind in ("decode", "prompt")
                for figure in (
                    f"{min(times[name, kind]):.2f}",
                    f"{statistics.median(times[name, kind]):.2f}",
                )
            ),
        )
        for name in peers
    ]
    head = ("model", "ms a token", "median", f"ms a prompt of {LONG}", "median")
    print(format_table(head, rows))


def models(folder: Path, options: argparse.Namespace) -> dict[str, Timed]:
    """What is timed, by name."""
    dense: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sparse = copy.deepcopy(dense)
    hf_sparse.prune_(sparse, hf_sparse.SparsityConfig("2:4"), "magnitude")
    found = {"dense fp32": compiled(dense, None, options.target)}
    half = copy.deepcopy(dense).bfloat16()
    found["dense bf16"] = compiled(half, None, options.target)
    for bits in (8, 4):
        coded = copy.deepcopy(dense)
        hf_sparse.quantize_(coded, bits=bits, group_size=32, embedding_bits=8)
        file = options.work / f"smollm2-int{bits}.gguf"
        hf_sparse.export_gguf(coded, file, tokenizer=tokenizer, overwrite=True)
        megabytes = file.stat().st_size / 1e6
        name = f"llama.cpp {'Q8_0' if bits == 8 else 'Q4_0'} ({megabytes:.0f} MB)"
        found[name] = in_llama_cpp(options.python, file, options.threads)
        found[f"dense int{bits}"] = compiled(coded, None, options.target)
        found[f"2:4 int{bits}"] = compiled(sparse, bits, options.target)
    return found


def compiled(model: Any, bits: int | None, target: str | None) -> Timed:
    """A compiled model, timed in this process."""
    made: Any = hf_sparse.compile(model, bits=bits, target=target)
    ids = torch.randint(100, 30000, (1, LONG), generator=torch.Generator().manual_seed(0))
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    @torch.inference_mode()
    def timed(kind: str, number: int) -> float:
        if kind == "prompt":
            start = time.perf_counter()
            made(ids[:, :number], logits_to_keep=1)
            return (time.perf_counter() - start) * 1e3
        seconds = []
        for tokens in (1, number + 1):
            start = time.perf_counter()
            made.generate(ids[:, :PROMPT], max_new_tokens=tokens, **settings)
            seconds.append(time.perf_counter() - start)
        return (seconds[1] - seconds[0]) / number * 1e3

    timed("decode", 4)
    return timed


def in_llama_cpp(python: str, file: Path, threads: int) -> Timed:
    """A file in llama.cpp, timed in a process of another environment."""
    worker = Path(__file__).with_name("llama_worker.py")
    process = subprocess.Popen(
        [python, str(worker), str(file), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    asked, answers = process.stdin, process.stdout
    assert asked is not None
    assert answers is not None
    if answers.readline().strip() != "ready":
        sys.exit(f"llama.cpp does not open {file}, see above.")

    def timed(kind: str, number: int) -> float:
        asked.write(f"{kind} {number}\n")
        asked.flush()
        return float(answers.readline())

    return timed


if __name__ == "__main__":
    main(options)
