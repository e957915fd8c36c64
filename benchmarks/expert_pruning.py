"""Ways to choose the experts of a mixture that go, by held-out perplexity, on a real mixture.

    python benchmarks/real_mixture.py MIXTURE --data FOLDER     # made from SmolLM2-135M, once
    python benchmarks/expert_pruning.py MIXTURE --data FOLDER   # WikiText-2 and C4, see real_models
    python benchmarks/expert_pruning.py MIXTURE                 # prose that Python ships

A quarter and a half of the experts go, by each score of `hf_sparse.drop_experts_`, and merged with
`--merged`, in bfloat16 where the CPU multiplies it. Prints the perplexity of the mixture and of each
smaller one: nothing is trained after experts went. With `--out` each row is a line of JSON, too; rows
that the file has are skipped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("mixture", type=Path, help="folder that real_mixture.py wrote")
    parser.add_argument(
        "--data", type=Path, help="folder with WikiText-2 and C4, see real_models.py"
    )
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--merged", action="store_true", help="also with merging")
    parser.add_argument("--windows", type=int, default=8, help="to score on, of 512 tokens")
    parser.add_argument("--held-out", type=int, default=8, help="windows to measure on")
    parser.add_argument("--texts", nargs="+", help="which of the texts to measure on (default all)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

import torch
from real_mixture import perplexity
from real_models import faster, machine, texts
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.counts import format_table

WAYS: dict[str, dict[str, Any]] = {
    "reap": {"by": "reap"},
    "frequency": {"by": "frequency"},
    "magnitude": {"by": "magnitude"},
}
MERGED: dict[str, dict[str, Any]] = {
    "merged, by frequency": {"by": "frequency", "merge": True},
    "merged, by reap": {"by": "reap", "merge": True},
}


def main(options: argparse.Namespace) -> None:
    """Remove experts in every way, and print perplexities."""
    torch.set_num_threads(options.threads)
    print(machine(), flush=True)
    tokenizer = AutoTokenizer.from_pretrained(options.mixture)
    calibration, held_out = texts(options.data)
    told = options.texts or list(held_out)
    scored_on = hf_sparse.calibration_batches(
        tokenizer, calibration, num_samples=options.windows, window=512
    )
    measured = {
        name: hf_sparse.calibration_batches(
            tokenizer, held_out[name], num_samples=options.held_out, window=512
        )
        for name in told
    }
    known = [row for row in read(options.out) if row["mixture"] == options.mixture.name]
    ways = {**WAYS, **(MERGED if options.merged else {})}
    cells = [(0.0, "none", {})]
    cells += [(share, name, how) for share in options.shares for name, how in ways.items()]
    for share, name, how in cells:
        if any((row["share"], row["by"]) == (share, name) for row in known):
            continue
        model = AutoModelForCausalLM.from_pretrained(options.mixture, dtype=faster()).eval()
        start = time.process_time()
        if share:
            looks = how["by"] != "magnitude" or "merge" in how
            hf_sparse.drop_experts_(model, share, scored_on if looks else None, **how)
        row = {
            "share": share,
            "by": name,
            "weights": model.num_parameters(),
            "seconds": time.process_time() - start,
            "perplexity": {text: perplexity(model, own) for text, own in measured.items()},
            "windows": options.windows,
            "held_out": options.held_out,
            "mixture": options.mixture.name,
            "type": str(faster()).removeprefix("torch."),
            "machine": machine(),
        }
        print(json.dumps(row), flush=True)
        known.append(row)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    rows = [
        (
            f"{row['share']:.0%} of the experts gone, {row['by']}" if row["share"] else "mixture",
            f"{row['weights']:,}",
            *(f"{row['perplexity'][name]:.2f}" for name in told),
            f"{row['seconds']:.0f}",
        )
        for row in known
    ]
    head = ("model", "weights", *(f"perplexity, {name}" for name in told), "CPU seconds")
    print(format_table(head, rows))


def read(file: Path | None) -> list[dict[str, Any]]:
    """The rows that are there."""
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    main(options)
