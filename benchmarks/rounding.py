"""What rounding costs single layers of SmolLM2-135M, dense and 2:4, by each way to round.

    python benchmarks/rounding.py --data FOLDER    # WikiText-2 and C4, see real_models.texts

For the layers of two blocks, on the dense model's inputs: the squared error of the outputs relative to
the outputs, `||X (W - Q)ᵀ||² / ||X Wᵀ||²`, on text that no solver has seen; the mean over the layers.
It takes a minute, and tells which way is better; what a model loses by it tells quantize.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder with WikiText-2 and C4 texts")
    parser.add_argument("--out", type=Path, default=Path("bench_output/rounding.json"))
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--windows", type=int, default=12, help="of text; half as many test")
    options = parser.parse_args()

import tempfile

import torch
from real_models import dense_smollm2, machine, texts
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.calibration.input_statistics import Grams, Seen
from hf_sparse.calibration.linalg import matmul
from hf_sparse.calibration.walk import run_model
from hf_sparse.patterns import Pattern
from hf_sparse.pruning import alps, few_bits, sparsegpt
from hf_sparse.pruning.problem import Notes, Problem
from hf_sparse.quantization import Grid, rounded
from hf_sparse.structure.layers import TargetLayer, block_layers

WINDOW = 512
GRIDS = {"int8": Grid(8), "int4 g64": Grid(4, 64), "int4 g32": Grid(4, 32)}
NM, DENSE = Pattern.parse("2:4"), Pattern.parse("unstructured")
# Solvers by name, and whether they round while they prune.
SOLVERS = {"sparsegpt": (sparsegpt.solve, True), "alps": (alps.solve, False)}


@torch.no_grad()
def main(options: argparse.Namespace) -> None:
    """Measure, print and write."""
    errors: dict[str, list[float]] = {}
    for problem, unseen in problems(options):
        for name, weights in ways(problem):
            errors.setdefault(name, []).extend(
                error(dense, found, unseen)
                for dense, found in zip(problem.weights, weights, strict=True)
            )
    means = {name: sum(found) / len(found) for name, found in errors.items()}
    head = {"machine": machine(), "blocks": options.blocks, "windows": options.windows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**head, "errors": means}, indent=2) + "\n")
    print(f"{head['machine']}\n\n| weights | error |\n|---|---|")
    for name, mean in means.items():
        print(f"| {name} | {mean:.5f} |")


def problems(options: argparse.Namespace) -> Iterator[tuple[Problem, Tensor]]:
    """The layers of the blocks that share inputs, and the Gram matrix of inputs that nobody saw."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = dense_smollm2(Path(temporary) / "SmolLM2")
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration, held_out = texts(options.data)
    wanted = tuple(f"layers.{block}." for block in options.blocks)
    layers = [layer for layer in block_layers(model) if any(name in layer.name for name in wanted)]
    seen, other = (
        groups(model, layers, tokenizer, documents, number)
        for documents, number in (
            (calibration, options.windows),
            (next(reversed(held_out.values())), options.windows // 2),
        )
    )
    for group, test in zip(seen, other, strict=True):
        shares = dict.fromkeys((layer.name for layer in group.layers), 0.0)
        yield Problem.of(group, DENSE, shares, Notes()), test.statistic


def groups(
    model: torch.nn.Module,
    layers: list[TargetLayer],
    tokenizer: object,
    text: list[str],
    number: int,
) -> list[Seen]:
    """What groups of layers see of a text."""
    grams = Grams()
    with grams.collecting(layers):
        batches = hf_sparse.calibration_batches(tokenizer, text, num_samples=number, window=WINDOW)
        run_model(model, batches, grams)
    return grams.groups()


def ways(dense: Problem) -> Iterator[tuple[str, list[Tensor]]]:
    """Each way to prune and to round, and the weights that it gives."""
    for name, grid in GRIDS.items():
        yield from roundings(name, dense, list(dense.weights), grid)
    for method, (solve, rounds) in SOLVERS.items():
        nm = replace(dense, pattern=NM, sparsities=[0.5] * len(dense.weights))
        pruned = solve(nm)
        yield f"{method} 2:4", pruned
        for name, grid in GRIDS.items():
            after = replace(dense, weights=pruned)
            yield from roundings(f"{method} 2:4, then {name}", after, pruned, grid)
            on_grid = replace(nm, grid=grid)
            joint = solve(on_grid) if rounds else pruned
            together = few_bits.rounded(on_grid, joint, is_rounded=rounds)
            yield f"{method} 2:4 {name}, together", together


def roundings(
    name: str, problem: Problem, weights: list[Tensor], grid: Grid
) -> Iterator[tuple[str, list[Tensor]]]:
    """Weights that are rounded with nothing known of what they were before."""
    inputs = problem.gram.diagonal()
    yield f"{name}, nearest", [rounded(weight, grid) for weight in weights]
    yield f"{name}, nearest by input norms", [rounded(weight, grid, inputs) for weight in weights]
    yield f"{name}, gptq", few_bits.rounded(replace(problem, grid=grid), weights)


def error(dense: Tensor, found: Tensor, gram: Tensor) -> float:
    """The squared error of a layer's outputs, relative to the outputs."""
    lost = dense - found
    return float((matmul(lost, gram) * lost).sum() / (matmul(dense, gram) * dense).sum())


if __name__ == "__main__":
    main(options)
