"""A classifier made smaller: heads and neurons of MiniLM on SST-2, removed whole.

    python benchmarks/shrink.py --data DATA/glue --out bench_output/shrink
    python benchmarks/shrink.py --data DATA/glue --out /tmp/shrink --limit 320    # does it run?

The dense model is fine-tuned for an epoch and saved in OUT/dense; a run that finds it there takes it.
Then, in each of some rounds, heads and neurons of least Taylor score over all blocks go, what is left
of their layers is refitted, the model is shrunk, and fine-tuned for an epoch with the dense model as
teacher. Each round removes the same share of what the last one left. With --uniform blocks keep all
heads and as many neurons each (BERT's config tells no more), and whole blocks go, without which the
loss is lowest: the checkpoint is a plain BertForSequenceClassification. OUT/shrunk is what comes out: a
checkpoint with its tokenizer and a model card. Embeddings stay frozen.

Printed: accuracy on the validation set, weights and products of the blocks, and torch's latency. What
ONNX Runtime makes of the two folders is for whoever exports them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2")
    parser.add_argument("--out", type=Path, required=True, help="folder for dense and shrunk")
    parser.add_argument("--start", type=Path, help="a shrunk checkpoint to go on from")
    parser.add_argument("--heads", type=float, default=1 / 3, help="share that stays")
    parser.add_argument("--neurons", type=float, default=0.4, help="share that stays")
    parser.add_argument("--uniform", action="store_true", help="a plain model: blocks, not heads")
    parser.add_argument("--blocks", type=float, default=0.5, help="share that stays, if uniform")
    parser.add_argument("--rounds", type=int, default=3, help="of removing and fine-tuning")
    parser.add_argument(
        "--epochs", type=int, default=1, help="of each round (the last has one more)"
    )
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--calibration", type=int, default=2048, help="rows for the Taylor scores")
    parser.add_argument("--limit", type=int, help="only so many rows of each split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20, help="forward passes that are timed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()

import torch
from glue import TASKS, Data, evaluate, load_model
from real_models import PLAIN, machine
from transformers import AutoModelForSequenceClassification, get_scheduler

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.counts import format_table
from hf_sparse.shrinking import ShrinkReport
from hf_sparse.structure.units import find_units

TASK = "sst2"
BASE = "sentence-transformers/all-MiniLM-L6-v2"
BATCH = 32
SHAPES = ((1, 128), (8, 128))


def fine_tune(model: Any, training: Data, epochs: int, args: argparse.Namespace) -> float:
    """Train with AdamW, a linear schedule and bfloat16 products; returns the seconds."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01, fused=True)
    total = epochs * math.ceil(len(training.inputs) / BATCH)
    scheduler = get_scheduler("linear", optimizer, round(0.1 * total), total)
    chooser = random.Random(args.seed)
    start, steps = time.perf_counter(), 0
    model.train()
    for _ in range(epochs):
        for batch in training.batches(BATCH, chooser):
            with torch.autocast(args.device, torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            steps += 1
            if steps % 200 == 0:
                done = time.perf_counter() - start
                print(
                    f"  step {steps} of {total}, loss {float(loss):.3f}, {done:.0f} s", flush=True
                )
    model.eval()
    return time.perf_counter() - start


def dense_model(training: Data, validation: Data, args: argparse.Namespace) -> Any:
    """The fine-tuned dense model, from OUT/dense if it is there."""
    folder = args.out / "dense"
    if not folder.exists():
        model, tokenizer = load_model(TASKS[TASK])
        model.to(args.device)
        seconds = fine_tune(model, training, 1, args)
        hf_sparse.save_pretrained(model, folder, PLAIN, tokenizer=tokenizer, base_model=BASE)
        score = evaluate(model, validation, TASKS[TASK].metric)
        print(f"dense: accuracy {score:.2f} after {seconds:.0f} s", flush=True)
    return load(folder, args)


def load(folder: Path, args: argparse.Namespace) -> Any:
    """A checkpoint, its embeddings frozen."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, attention_probs_dropout_prob=0.0
    )
    model.bert.embeddings.requires_grad_(False)
    return model.to(args.device)


def remove(model: Any, heads: int, neurons: int, batches: list[Any]) -> ShrinkReport:
    """Shrink a model to so many heads and neurons in all, those of highest Taylor score."""
    for pattern, wanted, name in (("head", heads, "heads"), ("column", neurons, "neurons")):
        there = sum(getattr(units.size, name) for units in find_units(model))
        config = SparsityConfig(pattern, max(0.0, 1 - wanted / there))
        hf_sparse.prune_(model, config, "taylor", batches, scope="global", refine="refit")
    return hf_sparse.shrink_(model)


def remove_uniformly(model: Any, blocks: int, neurons: int, batches: list[Any]) -> Any:
    """Take a model to so many blocks of so many neurons each, and leave a plain one."""
    there = find_units(model)
    report: Any = None
    if len(there) > blocks:
        report = hf_sparse.drop_blocks_(model, len(there) - blocks, batches[:8])
    if there[0].size.neurons > neurons:
        config = SparsityConfig("column", 1 - neurons / there[0].size.neurons, uniform=True)
        hf_sparse.prune_(model, config, "taylor", batches, refine="refit")
        report = hf_sparse.shrink_(model)
    return report


def products(model: Any, tokens: int) -> int:
    """Multiplications in the blocks for one sequence: of weights, and of queries, keys, values."""
    found = 0
    for units in find_units(model):
        found += tokens * sum(layer.weight.numel() for layer in units.layers)
        found += 2 * tokens**2 * units.size.heads * units.head_dim
    return found


@torch.no_grad()
def latency(models: dict[str, Any], batch: int, tokens: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of a forward, the models in turns."""
    ids = torch.randint(1000, 2000, (batch, tokens))
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats + 2):
        for name, model in models.items():
            start = time.perf_counter()
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def main(args: argparse.Namespace) -> None:
    """Train, shrink, print."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    task = TASKS[TASK]
    _, tokenizer = load_model(task)
    training, validation = (
        Data(args.data / TASK, task, split, tokenizer, args.device)
        for split in ("train", "validation")
    )
    for split in (training, validation):
        split.inputs, split.labels = split.inputs[: args.limit], split.labels[: args.limit]

    dense = dense_model(training, validation, args)
    model = (
        dense_model(training, validation, args) if args.start is None else load(args.start, args)
    )
    full = find_units(dense)
    start = time.perf_counter()
    chooser = random.Random(args.seed)
    batches = list(training.batches(BATCH, chooser))[: max(1, args.calibration // BATCH)]
    report: Any = None
    for number in range(1, args.rounds + 1):
        shares = [share ** (number / args.rounds) for share in (args.heads, args.neurons)]
        heads = round(shares[0] * sum(units.size.heads for units in full))
        neurons = round(shares[1] * sum(units.size.neurons for units in full))
        if args.uniform:
            left = round(args.blocks ** (number / args.rounds) * len(full))
            report = remove_uniformly(model, left, neurons // len(full), batches)
        else:
            report = remove(model, heads, neurons, batches)
        before = evaluate(model, validation, task.metric)
        hidden = 0.0 if args.uniform else 1.0  # other numbers of blocks have no states to compare
        teaching = hf_sparse.Distillation(dense, logits=0.5, hidden=hidden, temperature=2.0)
        teaching.attach(model)
        last = number == args.rounds
        seconds = fine_tune(model, training, args.epochs + last, args)
        teaching.remove()
        after = evaluate(model, validation, task.metric)
        print(
            f"round {number}: {report.summary() if report else 'nothing went'}\naccuracy "
            f"{before:.2f}, fine-tuned {after:.2f}, "
            f"{seconds:.0f} s",
            flush=True,
        )
    seconds = time.perf_counter() - start

    models = {"dense": dense.cpu().eval(), "shrunk": model.cpu().eval()}
    validation.device = "cpu"
    scores = {name: evaluate(found, validation, task.metric) for name, found in models.items()}
    metric = hf_sparse.Metric("accuracy, SST-2 validation", scores["shrunk"], scores["dense"])
    hf_sparse.save_pretrained(
        model, args.out / "shrunk", tokenizer=tokenizer, base_model=BASE, metrics=[metric]
    )
    counts = {name: products(found.eval(), 128) for name, found in models.items()}
    speeds = {shape: latency(models, *shape, args.repeats) for shape in SHAPES}
    rows = [
        (
            name,
            f"{scores[name]:.2f}",
            f"{sum(p.numel() for p in found.parameters()):,}",
            f"{counts[name] / counts['dense']:.3f}",
            *(f"{speeds[shape][name]:.2f}" for shape in SHAPES),
        )
        for name, found in models.items()
    ]
    titles = [f"torch {batch}x{tokens}, ms" for batch, tokens in SHAPES]
    print(format_table(("model", "accuracy", "weights", "products", *titles), rows))
    result = {
        "scores": scores,
        "products": counts,
        "sizes": [vars(units.size) for units in find_units(model)],
        "latency_ms": {f"{b}x{t}": found for (b, t), found in speeds.items()},
        "seconds": round(seconds, 1),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "machine": machine(args.device),
    }
    (args.out / "shrink.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(args)
