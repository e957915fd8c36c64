"""One token: the kernels for it, and SmolLM2-135M with and without zeros, for several targets.

    python benchmarks/one_token.py                           the kernels
    python benchmarks/one_token.py --model                   SmolLM2-135M, in turns
    python benchmarks/one_token.py --model --bits 8 4        the same with 8 and 4 bits beside it
    python benchmarks/one_token.py --model --outside         what a call takes outside of the kernels

Kernels: ns for 1000 weights of 576 x 1536, zeros counted, on one thread; in cache, and from memory,
where copies take turns. Times are the least of many for one matrix, and their 5th percentile from
memory. The model: ms of a new token behind 32, the least and the median, and of a token of `generate`,
over the own dense model of the same type and target. Outside: CPU time of the calling thread without
the programs, one thread.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import os
import statistics
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", help="all that this CPU can run by default")
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--bits", nargs="+", type=int, default=[], help="8, 4 or both, beside the types"
    )
    parser.add_argument("--model", action="store_true", help="a whole model")
    parser.add_argument("--outside", action="store_true", help="only what is outside of kernels")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2, help="of the model")
    parser.add_argument("--work", type=Path, default=Path("bench_output"))
    args = parser.parse_args()

import numpy as np
import torch
from real_models import config_for, dense_smollm2, machine
from transformers import AutoModelForCausalLM, DynamicCache

import hf_sparse
from hf_sparse.report import format_table
from hf_sparse.runtime.kernels.all import kernels
from hf_sparse.runtime.kernels.call import run
from hf_sparse.runtime.kernels.code_formats import BLOCK, FORMATS
from hf_sparse.runtime.kernels.code_rows import QUANTISE_ROW
from hf_sparse.runtime.kernels.shuffled_rows import WINDOWS
from hf_sparse.runtime.kernels.weight_types import WEIGHT_TYPES
from hf_sparse.runtime.llvm.jit import DEFAULT_CACHE
from hf_sparse.runtime.llvm.target import Target, host, named, targets
from hf_sparse.runtime.programs.program import Program
from hf_sparse.runtime.weights.codes import on, pack_codes
from hf_sparse.runtime.weights.memory import Shelf, aligned
from hf_sparse.runtime.weights.rates import DENSE, MASK
from hf_sparse.runtime.weights.single_rows import pack_single, row_operation
from hf_sparse.upstream.transformers.caches import cache_name

ROWS, COLUMNS, MEMORY = 576, 1536, 100 << 20
ZEROS = ("50 %", "2:4")


def weight(kind: Any) -> np.ndarray:
    """Random weights: all, half of them, or those of a window."""
    random = np.random.default_rng(0)
    values = random.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    if kind == MASK:
        values[random.random(values.shape) < 0.5] = 0
    elif kind != DENSE:
        order = random.random((ROWS, COLUMNS // kind.columns, kind.columns)).argsort(axis=-1)
        values[(order >= kind.kept).reshape(values.shape)] = 0
    return torch.from_numpy(values).bfloat16().float().numpy()


def of_kernels(target: Target, dtype: torch.dtype) -> list[tuple[str, ...]]:
    """A row for each kernel."""
    kept, x, y = WEIGHT_TYPES[dtype], aligned(COLUMNS).normal_(), aligned(ROWS)
    code, rows = kernels(target, DEFAULT_CACHE, kept), []
    for kind in (DENSE, MASK, *WINDOWS):
        array, found = weight(kind), []
        nbytes = 0
        for room in (0, MEMORY):
            shelf = Shelf()
            copies = [pack_single(array, kind, kept, shelf)]
            nbytes = copies[0].nbytes
            copies += [pack_single(array, kind, kept, shelf) for _ in range(room // nbytes)]
            times = []
            for turn in range(max(60, 3 * len(copies))):
                single = copies[turn % len(copies)]
                ends = (x.data_ptr(), y.data_ptr(), 0, 0, ROWS)
                operation = row_operation(single, *ends, add=False)
                start = time.perf_counter()
                run(code, operation)
                times.append(time.perf_counter() - start)
            spent = float(np.percentile(times, 5)) if room else min(times)
            found.append(spent * 1e12 / array.size)
        name = kind if isinstance(kind, str) else kind.name
        name = f"{name}, 50 % zeros" if kind == MASK else name
        each = f"{nbytes / array.size:.2f}"
        gb = f"{nbytes / array.size * 1000 / found[1]:.1f}"
        label = str(dtype).removeprefix("torch.")
        rows.append((target.name, label, name, each, f"{found[0]:.0f}", f"{found[1]:.0f}", gb))
    return rows


def of_codes(target: Target, bits: int) -> list[tuple[str, ...]]:
    """A row for each pattern of codes, and one for the features in eight bits."""
    x, y, records = aligned(COLUMNS).normal_(), aligned(ROWS), aligned(COLUMNS)
    code, rows = kernels(target, DEFAULT_CACHE, codes=True), []
    made = QUANTISE_ROW.operation(
        "quantise_row", x=x.data_ptr(), records=records.data_ptr(), blocks=COLUMNS // BLOCK
    )
    run(code, made)
    random = np.random.default_rng(0)
    for form in (
        one for one in FORMATS if one.bits == bits and one.group == (64 if bits == 8 else 32)
    ):
        codes = random.integers(-7, 8, (ROWS, COLUMNS)).astype(np.int8)
        order = random.random((ROWS, COLUMNS // form.window, form.window)).argsort(axis=-1)
        if form.is_masked:  # half of the weights, anywhere
            codes[random.random(codes.shape) < 0.5] = 0
        else:
            codes[(order >= form.kept).reshape(codes.shape)] = 0
        scales = np.ones((ROWS, COLUMNS // form.group), np.float32)
        found, shelf = [], Shelf()
        for room in (0, MEMORY):
            copies = [pack_codes(codes, scales, form.group, form, shelf)]
            copies += [on(copies[0], shelf) for _ in range(room // copies[0].nbytes)]
            times = []
            for turn in range(max(60, 3 * len(copies))):
                ends = (records.data_ptr(), y.data_ptr(), 0, 0, ROWS)
                operation = copies[turn % len(copies)].operation(*ends, add=False)
                start = time.perf_counter()
                run(code, operation)
                times.append(time.perf_counter() - start)
            spent = float(np.percentile(times, 5)) if room else min(times)
            found.append(spent * 1e12 / codes.size)
        gb = f"{form.bytes_for(0.5) * 1000 / found[1]:.1f}"
        figures = (f"{form.bytes_for(0.5):.2f}", f"{found[0]:.1f}", f"{found[1]:.1f}", gb)
        rows.append((target.name, f"int{bits}", form.pattern, *figures))
    return rows


def smollm2(work: Path, dtype: torch.dtype) -> Any:
    """SmolLM2-135M in a type."""
    folder = work / "smollm2"
    if not (folder / "config.json").exists():
        dense_smollm2(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval().to(dtype)


def with_cache(model: Any, ids: torch.Tensor) -> Any:
    """What calls a model for one token behind `ids`."""
    cache = DynamicCache(config=model.config)
    given = {cache_name(model.forward): cache, "use_cache": True}
    model(input_ids=ids, **given)

    def step() -> None:
        model(input_ids=ids[:, :1], **given)
        cache.crop(-1)

    return step


def per_token(model: Any, ids: torch.Tensor) -> float:
    """ms of a token of `generate`: the difference between many and a few."""
    spent = []
    for count in (4, 36):
        start = time.perf_counter()
        model.generate(
            ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        spent.append((time.perf_counter() - start) * 1e3)
    return (spent[1] - spent[0]) / 32


def of_model(
    work: Path, wanted: list[Target], dtype: torch.dtype, bits: list[int], turns: int
) -> list[Any]:
    """A row for each target, kind of zeros, and number of bits."""
    model, label = smollm2(work, dtype), str(dtype).removeprefix("torch.")
    ids = torch.randint(0, model.config.vocab_size, (1, 32))
    ways: dict[tuple[str, str, str], Any] = {}
    for zeros in ("", *ZEROS):
        pruned = copy.deepcopy(model)
        if zeros:
            hf_sparse.prune_(pruned, config_for(zeros), "magnitude")
        for target, few in itertools.product(wanted, (None, *bits)):
            if few and zeros.endswith("%"):
                continue  # the dense kernel takes it
            compiled = hf_sparse.compile(pruned, target=target.name, bits=few)
            name = label if few is None else f"int{few}"
            ways[target.name, name, zeros or "own dense"] = compiled, with_cache(compiled, ids)
        del pruned
        gc.collect()
    times: dict[tuple[str, str, str], list[float]] = {way: [] for way in ways}
    tokens: dict[tuple[str, str, str], list[float]] = {way: [] for way in ways}
    for turn in range(turns + 2):
        for way, (compiled, step) in ways.items():
            for last in (False, True):  # the second is timed: its weights are where they would be
                start = time.perf_counter()
                step()
                if last and turn >= 2:
                    times[way].append((time.perf_counter() - start) * 1e3)
            if turn % 5 == 2:
                tokens[way].append(per_token(compiled, ids))
    rows = []
    for (name, kind, zeros), found in times.items():
        dense = times[name, label, "own dense"]
        ratio = statistics.median(a / b for a, b in zip(dense, found, strict=True))
        least, middle = min(found), statistics.median(found)
        row = (name, kind, zeros, f"{least:.1f}", f"{middle:.1f}", f"{min(dense) / least:.2f}")
        rows.append((*row, f"{ratio:.2f}", f"{min(tokens[name, kind, zeros]):.1f}"))
    return sorted(rows)


def outside(work: Path, turns: int) -> str:
    """CPU time of a call, and of `generate` for each token, without what programs take."""
    inner, real = [0.0], Program.run

    def timed(self: Program, **addresses: int) -> None:
        start = time.thread_time()
        real(self, **addresses)
        inner[0] += time.thread_time() - start

    def spent(call: Any) -> float:
        inner[0], start = 0.0, time.thread_time()
        call()
        return (time.thread_time() - start - inner[0]) * 1e3

    torch.set_num_threads(1)
    compiled = hf_sparse.compile(smollm2(work, torch.bfloat16))
    ids = torch.randint(0, compiled.config.vocab_size, (1, 32))
    setattr(Program, "run", timed)  # noqa: B010
    step = with_cache(compiled, ids)
    calls = [spent(step) for _ in range(turns)]
    each = []
    for _ in range(3):
        short, long = (
            spent(
                lambda n=n: compiled.generate(
                    ids, max_new_tokens=n, do_sample=False, eos_token_id=-1
                )
            )
            for n in (4, 20)
        )
        each.append((long - short) / 16)
    call, token = f"{min(calls):.2f} ms ({statistics.median(calls):.2f})", f"{min(each):.2f} ms"
    return f"outside of the kernels: model(...) {call}, generate {token} a token"


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    names = args.targets or list(targets())
    order = list(targets())
    wanted = [named(n) for n in names if order.index(n) >= order.index(host().name)]
    torch.manual_seed(0)
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}")
    types = [getattr(torch, name) for name in args.types]
    with torch.inference_mode():
        if args.outside:
            print(outside(args.work, args.turns))
        elif args.model:
            torch.set_num_threads(args.threads)
            head = ("target", "weights", "zeros", "least ms", "median", "dense / it", "by medians")
            rows = [
                row
                for dtype in types
                for row in of_model(args.work, wanted, dtype, args.bits, args.turns)
            ]
            print(format_table((*head, "generate"), rows))
        else:
            torch.set_num_threads(1)
            head = ("target", "weights", "kernel", "bytes", "ns in cache", "ns from memory", "GB/s")
            rows = [
                row for target in wanted for dtype in types for row in of_kernels(target, dtype)
            ]
            rows += [
                row for target in wanted for bits in args.bits for row in of_codes(target, bits)
            ]
            print(format_table(head, rows))


if __name__ == "__main__":
    main(args)
