"""Where the time of a call goes: kernels on each thread, waits, and what this CPU can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_sparse.counts import format_table
from hf_sparse.runtime.kernels import peaks
from hf_sparse.runtime.kernels.call import Operation
from hf_sparse.runtime.llvm.jit import Code
from hf_sparse.runtime.llvm.target import Target, capabilities
from hf_sparse.runtime.model.layers import CompiledLayer
from hf_sparse.runtime.model.single_layers import CompiledHead, CompiledLinear
from hf_sparse.runtime.programs.clocks import Clocks, listening
from hf_sparse.runtime.programs.program import Program
from hf_sparse.runtime.weights.linear import Linear
from hf_sparse.runtime.weights.memory import aligned

_REPEATS, _ROUNDS = 5, 200_000
# Beginnings of the names of kernels that multiply by weights.
_PRODUCTS = ("spmm", "dense", "sparse_rows", "shuffled", "code_")


@dataclass(frozen=True)
class Peaks:
    """What all threads together can do at most, measured by `kernels/peaks.py`.

    Attributes:
        gflops: multiply-adds, each of which counts as two, in 10^9 a second.
        bandwidth: reading memory, GB/s.
    """

    gflops: float
    bandwidth: float


@dataclass(frozen=True)
class Profile:
    """The time of a call, in milliseconds. `str` gives a table.

    Attributes:
        target, has: the target's name, and what else the CPU has.
        threads: of the programs.
        call, programs: of the whole call, and of the programs in it; means of several calls.
        kernels: of each kernel, by thread.
        waits: at barriers, by thread.
        peaks: what the CPU can do.
        gflop, gbytes: work of the products with weights, and bytes of these, each once.
    """

    target: str
    has: tuple[str, ...]
    threads: int
    call: float
    programs: float
    kernels: dict[str, tuple[float, ...]]
    waits: tuple[float, ...]
    peaks: Peaks
    gflop: float
    gbytes: float

    @property
    def products(self) -> float:
        """Milliseconds of the products with weights: of the thread with the most."""
        times = [each for name, each in self.kernels.items() if name.startswith(_PRODUCTS)]
        return max(map(sum, zip(*times, strict=True)), default=0.0)

    @property
    def least(self) -> float:
        """Milliseconds that the products take at least: by multiply-adds, or by memory."""
        return 1e3 * max(self.gflop / self.peaks.gflops, self.gbytes / self.peaks.bandwidth)

    def __repr__(self) -> str:
        return f"<Profile: {self.call:.2f} ms, {self.programs:.2f} of them in kernels>"

    def __str__(self) -> str:
        head = ("kernel", *(f"thread {number}, ms" for number in range(self.threads)))
        ordered = sorted(self.kernels.items(), key=lambda item: -max(item[1]))
        rows = [(name, *(f"{spent:.3f}" for spent in each)) for name, each in ordered]
        rows.append(("waits", *(f"{spent:.3f}" for spent in self.waits)))
        has = f" ({', '.join(self.has)})" if self.has else ""
        return "\n".join(
            [
                f"target {self.target}, CPU{has}: {self.call:.3f} ms a call, of which "
                f"{self.call - self.programs:.3f} outside of the kernels",
                format_table(head, rows),
                f"Peaks of {self.threads} threads: {self.peaks.gflops:.0f} GF/s of multiply-adds, "
                f"{self.peaks.bandwidth:.1f} GB/s read.",
                f"Products with weights: {self.products:.3f} ms for {self.gflop:.3f} GF and "
                f"{1e3 * self.gbytes:.1f} MB, which the peaks allow in {self.least:.3f} ms.",
            ]
        )


def profile_call(
    model: nn.Module, call: Callable[[], Any], tokens: int, single: bool, repeats: int
) -> Profile:
    """Time the kernels of a compiled model inside real calls.

    Args:
        model: what `hf_sparse.compile` gave.
        call: calls it.
        tokens: that a call has.
        single: they go through the kernels for single tokens.
        repeats: calls, of which the means are told.

    Raises:
        ValueError: nothing of the model ran as a program.
    """
    call()
    with listening() as clocks:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        spent = (time.perf_counter() - start) / repeats
    if not clocks.runs:
        raise ValueError(f"no program of this {type(model).__name__} ran: is it compiled?")
    target, code = _code_of(model)
    return _profile(model, clocks, spent, tokens, single, repeats, target, code)


def _profile(
    model: nn.Module,
    clocks: Clocks,
    spent: float,
    tokens: int,
    single: bool,
    repeats: int,
    target: Target,
    code: Code,
) -> Profile:
    threads = len(clocks.waits)
    numbers, scale = range(threads), 1e3 / repeats
    kernels = {
        name: tuple(scale * each[number] for number in numbers)
        for name, each in clocks.kernels.items()
    }
    gflop, gbytes = _work(model, tokens, single)
    return Profile(
        target.name,
        capabilities(),
        threads,
        1e3 * spent,
        scale * clocks.programs,
        kernels,
        tuple(scale * clocks.waits[number] for number in numbers),
        measure_peaks(code, target, threads),
        gflop,
        gbytes,
    )


def _code_of(model: nn.Module) -> tuple[Target, Code]:
    for module in model.modules():
        if isinstance(module, CompiledLayer):
            return module.runner.target, module.runner.code
        if isinstance(module, CompiledLinear):
            return module.target, module.code
    raise ValueError(
        f"this {type(model).__name__} is not compiled: hf_sparse.compile(model) first."
    )


def _work(model: nn.Module, tokens: int, single: bool) -> tuple[float, float]:
    """10^9 operations and bytes of all products with weights that kernels compute."""
    operations = nbytes = 0
    linears = _of_blocks(model, single)
    for module in model.modules():
        if isinstance(module, CompiledLinear):
            linears.append(module.packed)
        if isinstance(module, CompiledHead) and single:
            operations += 2 * module.weight.numel() * tokens
            nbytes += module.read_bytes
    for linear in linears:
        kept = linear.rows * linear.columns - linear.zeros
        stored = kept if single else sum(packed.stored for packed in linear.packed)
        operations += 2 * stored * tokens
        if single and linear.single is not None:
            nbytes += linear.single.nbytes
        else:
            nbytes += sum(packed.nbytes for packed in linear.packed)
    return operations / 1e9, nbytes / 1e9


def _of_blocks(model: nn.Module, single: bool) -> list[Linear]:
    """What the blocks of a call multiply by: with single tokens, of an encoder nothing."""
    runners = dict.fromkeys(m.runner for m in model.modules() if isinstance(m, CompiledLayer))
    stacks = [runner.stack for runner in runners]
    return [
        linear
        for stack in (stacks[-1:] if single else stacks)
        for block in stack.blocks
        for name, linear in block.named_linears.items()
        if not (single and name == "cross.keys")
    ]


def measure_peaks(code: Code, target: Target, threads: int, nbytes: int = 64 << 20) -> Peaks:
    """Measure multiply-adds and reading on some threads; the best of a few runs.

    Args:
        code: has the kernels.
        target: of the code.
        threads: how many.
        nbytes: that each of them reads, about.
    """
    unit = peaks.SUMS * target.lanes
    count = nbytes // 4 // unit * unit
    sums, memory = aligned(threads, unit).fill_(0.5), aligned(threads, count)
    adds = [
        peaks.MULTIPLY_ADDS.operation("multiply_adds", x=row.data_ptr(), rounds=_ROUNDS)
        for row in sums
    ]
    reads = [
        peaks.READS.operation("reads", x=row.data_ptr(), nbytes=4 * count, y=own.data_ptr())
        for row, own in zip(memory, sums, strict=True)
    ]
    flops = 2 * _ROUNDS * unit * threads
    return Peaks(
        flops / _seconds(code, adds, sums) / 1e9,
        4 * count * threads / _seconds(code, reads, (sums, memory)) / 1e9,
    )


def _seconds(code: Code, operations: list[Operation], memory: object) -> float:
    program = Program(code, [[[operation] for operation in operations]], [memory])
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        program.run()
        times.append(time.perf_counter() - start)
    return min(times)
