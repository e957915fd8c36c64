"""What became of each layer: `compiled.explain()`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hf_sparse.report import format_table
from hf_sparse.runtime.kernels.all import kernels
from hf_sparse.runtime.kernels.weight_types import WEIGHT_TYPES
from hf_sparse.runtime.llvm.jit import Code
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.programs.program import Program
from hf_sparse.runtime.weights.linear import Linear
from hf_sparse.runtime.weights.memory import aligned
from hf_sparse.runtime.weights.rates import calibrate
from hf_sparse.runtime.weights.single_rows import kernel_of

_REPEATS = 7


@dataclass(frozen=True)
class LayerExplanation:
    """One weight of the compiled model.

    Attributes:
        name: the layer; joined names are multiplied at once.
        shape: `(out_features, in_features)`.
        pattern: what its zeros follow, `dense` without zeros.
        kernel: what multiplies it.
        sparsity: the fraction of zeros.
        nbytes: packed.
        predicted, measured: microseconds for the tokens of the explanation, by `kernel`.
        one_token: what multiplies it with a single token, empty if it never is.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    kernel: str
    sparsity: float
    nbytes: int
    predicted: float
    measured: float
    one_token: str = ""


@dataclass(frozen=True)
class Explanation:
    """All layers, and what was not compiled. `str` gives a table.

    Attributes:
        layers: in the order of their use.
        tokens, threads: what the times are for.
        target: name of the target.
        reason: why the blocks are not compiled as a whole, or None if they are.
        torch_layers: layers of the blocks that torch computes.
    """

    layers: tuple[LayerExplanation, ...]
    tokens: int
    threads: int
    target: str
    reason: str | None
    torch_layers: tuple[str, ...]

    def __repr__(self) -> str:
        measured = sum(layer.measured for layer in self.layers)
        whole = (
            "the blocks compiled as a whole" if self.reason is None else "single layers compiled"
        )
        tokens = f"{self.tokens} {'token' if self.tokens == 1 else 'tokens'}"
        return (
            f"<Explanation: {len(self.layers)} weights, {whole}, {measured:.0f} us measured for "
            f"{tokens} on {self.threads} {'thread' if self.threads == 1 else 'threads'}, target "
            f"{self.target}; print it for a row each>"
        )

    def __str__(self) -> str:
        head = ("layer", "shape", "pattern", "kernel", "one token", "zeros", "MB", "predicted us")
        rows = [
            (
                layer.name,
                f"{layer.shape[0]} x {layer.shape[1]}",
                layer.pattern,
                layer.kernel,
                layer.one_token,
                f"{layer.sparsity:.3f}",
                f"{layer.nbytes / 1e6:.2f}",
                f"{layer.predicted:.0f}",
                f"{layer.measured:.0f}",
            )
            for layer in self.layers
        ]
        total = (
            "sum",
            "",
            "",
            "",
            "",
            "",
            f"{sum(layer.nbytes for layer in self.layers) / 1e6:.2f}",
            f"{sum(layer.predicted for layer in self.layers):.0f}",
            f"{sum(layer.measured for layer in self.layers):.0f}",
        )
        lines = [
            f"{self.tokens} tokens, {self.threads} threads, target {self.target}; matrix products only",
            format_table((*head, "measured us"), [*rows, total]),
        ]
        if self.reason is not None:
            lines.append(
                f"The blocks are not compiled as a whole, only these layers: {self.reason}."
            )
        if self.torch_layers:
            listed = ", ".join(self.torch_layers[:6])
            more = len(self.torch_layers) - 6
            lines.append(f"torch computes {listed}{f' and {more} more' if more > 0 else ''}.")
        return "\n".join(lines)


def explain_layers(
    linears: Iterable[Linear],
    reason: str | None,
    model: nn.Module,
    target: Target,
    cache: Path | None,
    tokens: int,
) -> Explanation:
    """Predict and measure each weight for `tokens` tokens on torch's number of threads.

    Raises:
        ValueError: `tokens` is not positive.
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; wanted at least 1.")
    threads = torch.get_num_threads()
    width, rates = target.widths[0], calibrate(target, cache)
    layers_explained, every = [], list(linears)
    for linear in every:
        # Tiles go to threads whole; time is that of the thread with the most.
        code = kernels(
            target, cache, WEIGHT_TYPES[linear.dtype], any(one.codes is not None for one in every)
        )
        tiles = math.ceil(tokens / width)
        rounds = math.ceil(tiles / threads)
        size = linear.rows * linear.columns
        predicted = 0.0
        for height in {packed.height for packed in linear.packed}:
            stored = sum(packed.stored for packed in linear.packed if packed.height == height)
            predicted += 2 * stored * width * rounds / rates.rate(height, stored / size) / 1e3
        layers_explained.append(
            LayerExplanation(
                linear.name,
                (linear.rows, linear.columns),
                linear.pattern,
                linear.kernel,
                linear.sparsity,
                linear.nbytes,
                predicted,
                _measure(linear, code, width) * rounds * 1e6,
                "" if linear.single is None else kernel_of(linear.single),
            )
        )
    left = tuple(name for name, module in model.named_modules() if type(module) is nn.Linear)
    return Explanation(tuple(layers_explained), tokens, threads, target.name, reason, left)


def _measure(linear: Linear, code: Code, width: int) -> float:
    """Seconds for one tile of the widest kind, on one thread."""
    x, y = aligned(linear.columns, width).fill_(1.0), aligned(linear.rows, width)
    operations = [
        operation
        for number, start in enumerate(linear.edges[:-1])
        for operation in linear.operations(
            x.data_ptr() + 4 * width * start, y.data_ptr(), 4, part=number
        )
    ]
    program = Program(code, [[operations]], [linear, x, y])
    times = []
    for _ in range(_REPEATS):
        start_time = time.perf_counter()
        program.run()
        times.append(time.perf_counter() - start_time)
    return statistics.median(times)
