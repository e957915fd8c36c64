"""Would activations in bfloat16 make tiles faster? Two kernels that hf_sparse lacks, on one thread.

    spmm    tiles of X in bfloat16, two tokens in a lane, taken apart by shift and mask: half the loads,
            and panels of 128 or 256 columns fit L1
    dense   pairs of columns of X interleaved, for AVX512_BF16's vdpbf16ps, which multiplies two
            pairs of bfloat16 and adds both products to a float32

    python benchmarks/bfloat16_tiles.py

Both against the compiler's own kernels for float32, with the shapes of BERT-base, 128 tokens. What
turning activations into bfloat16 costs is left out, in favour of bfloat16. Times are the least of
many: other programs only add to them.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from real_models import machine

from hf_sparse.report import format_table
from hf_sparse.runtime import dense, packing, spmm
from hf_sparse.runtime.ir import Function, Value, Variable, vector
from hf_sparse.runtime.jit import Code, compile_kernels
from hf_sparse.runtime.memory import Shelf, aligned
from hf_sparse.runtime.target import Target, llvm, named
from hf_sparse.runtime.weight_types import BFLOAT16

SHAPES = [(768, 768), (3072, 768), (768, 3072)]
TILES, REPEATS, COPIES = 2, 60, 6


class NarrowTiles(spmm._Kernel):
    """`spmm` for tiles of X whose lanes hold two tokens each: lane i of vector v, tokens 2i and 2i + 1
    of 2 v times the lanes."""

    def _multiply(self, sums: list[list[list[Variable]]], count: int, first: int) -> None:
        f, kind = self.f, vector(self.lanes, "i32")
        values, indices = self.values.get(), self.indices.get()
        values.at(spmm._AHEAD_VALUES).prefetch()
        if count == self.unroll:
            indices.at(spmm._AHEAD_INDICES).prefetch()
        weights = values if self.widened is None else self._widen(values, self.widened, count)
        # A row of X is half as long as one of Y.
        before = self.panel_x.cast("ptrtoint", "i64") - self.x.cast("ptrtoint", "i64")
        panel = self.x.at(before >> 1)
        self.row_bytes //= 2
        offsets = self._offsets(indices, count)
        self.row_bytes *= 2
        for number in range(count):
            for side in range(self.sides):
                x = panel.at(offsets[side][number])
                columns: list[Value] = []
                for v in range(self.width // 2):
                    both = x.at(4 * self.lanes * v).load(kind, 4 * self.lanes)
                    columns.append((both << 16).cast("bitcast", self.kind))
                    columns.append((both & 0xFFFF0000).cast("bitcast", self.kind))
                weight = weights.at(4 * (side * count + number)).load("float").splat(self.lanes)
                for column, total in zip(columns, sums[side][0], strict=True):
                    total.set(f.fma(weight, column, total.get()))
        self.values.set(values.at(self.kept.size * count * self.sides))
        self.indices.set(indices.at(count * self.sides))


def narrow_spmm(target: Target) -> Function:
    """`spmm1x4` over X in bfloat16."""
    kernel = spmm.spmm(target, 1, 4, BFLOAT16)
    names = [parameter.name[1:] for parameter in kernel.parameters]
    kinds = [parameter.kind for parameter in kernel.parameters]
    f = Function("narrow", [f"{k} {n}" for k, n in zip(kinds, names, strict=True)], ("x", "y"))
    NarrowTiles(f, target, 1, 4, BFLOAT16).write()
    return f


def pair_dense(target: Target) -> Function:
    """Four rows of W, in pairs of columns, times tiles of four vectors: `y += W x`."""
    f = Function("pairs", ("ptr weight", "i64 pairs", "i64 rows", "ptr x", "ptr y"), ("x", "y"))
    weight, pairs, rows, x, y = f.parameters
    kind, size = vector(target.lanes), 4 * target.lanes
    narrow = vector(2 * target.lanes, "bfloat")
    with f.range(rows, step=4) as row:
        places = [weight.at((row + r) * pairs * 4) for r in range(4)]
        outputs = [y.at((row + r) * (4 * size)) for r in range(4)]
        sums = [
            [f.variable(out.at(size * v).load(kind, size)) for v in range(4)] for out in outputs
        ]
        with f.range(pairs, step=2) as pair:
            for place in places:
                place.at(pairs * 16).at(pair * 4).prefetch()
            for number in range(2):
                source = x.at((pair + number) * (4 * size))
                loaded = [source.at(size * v).load(narrow, size) for v in range(4)]
                for place, totals in zip(places, sums, strict=True):
                    both = place.at(pair * 4).at(4 * number).load("i32").splat(target.lanes)
                    factor = both.cast("bitcast", narrow)
                    for value, total in zip(loaded, totals, strict=True):
                        name = "llvm.x86.avx512bf16.dpbf16ps.512"
                        total.set(f.call(kind, name, total.get(), factor, value))
        for out, totals in zip(outputs, sums, strict=True):
            for v, total in enumerate(totals):
                out.at(size * v).store(total.get(), size)
    return f


def bits(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16."""
    stored: np.ndarray = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return stored


def raw(content: np.ndarray) -> torch.Tensor:
    """Numbers of any type in memory that begins at a cache line."""
    memory = aligned(content.nbytes // 4)
    memory.numpy()[:] = np.ascontiguousarray(content).view(np.float32).reshape(-1)
    return memory


def packed_by(weight: np.ndarray, panel: int, kept: Any) -> packing.PackedWeight:
    """A weight in panels of another width than the compiler's."""
    usual = packing.PANEL_COLUMNS
    packing.PANEL_COLUMNS = panel
    try:
        return packing.pack(weight, 1, kept)
    finally:
        packing.PANEL_COLUMNS = usual


def timed(code: Code, ways: dict[str, list[list[tuple[Any, ...]]]]) -> dict[str, list[float]]:
    """Seconds of each way, in turns; each has several copies of its calls."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(REPEATS):
        for way, copies in ways.items():
            start = time.perf_counter()
            for _ in range(TILES):
                for call in copies[turn % len(copies)]:
                    code.call(*call)
            times[way].append(time.perf_counter() - start)
    return times


def run(code: Code, rows: int, columns: int, width: int) -> list[tuple[str, ...]]:
    """Check and time all kernels for one shape."""
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.standard_normal((columns, width)).astype(np.float32)).bfloat16()
    x = x.float().numpy()
    weight = random.standard_normal((rows, columns)).astype(np.float32)
    weight = torch.from_numpy(weight).bfloat16().float().numpy()
    pruned = weight * (random.random(weight.shape) >= 0.9)
    lanes = width // 4
    places = raw(x)
    # Lane i of vector v: tokens 2i (low half) and 2i + 1, which become vectors 2v and 2v + 1 of Y.
    narrow = raw(bits(x))
    order = np.arange(width).reshape(2, lanes, 2).swapaxes(1, 2).reshape(-1)
    pairs = raw(bits(x).reshape(columns // 2, 2, width).swapaxes(1, 2))
    y, shelf = aligned(rows, width), Shelf()
    keep: list[Any] = [places, narrow, pairs, y, shelf]

    def sparse(packed: packing.PackedWeight, kernel: str, source: torch.Tensor) -> list[Any]:
        found = []
        for _ in range(COPIES):
            copy = packed.on(shelf)
            keep.append(copy)
            ends = (source.data_ptr(), y.data_ptr(), 0, spmm.START_SUM)
            found.append([(kernel, *copy.arguments(c), *ends) for c in range(len(copy.chunks) - 1)])
        return found

    usual = spmm.name(1, 4, BFLOAT16)
    sparse_ways = {
        "spmm 90 %, X float32": sparse(packed_by(pruned, 128, BFLOAT16), usual, places),
        "spmm 90 %, X bfloat16": sparse(packed_by(pruned, 128, BFLOAT16), "narrow", narrow),
        "spmm 90 %, X bfloat16, 256 columns": sparse(
            packed_by(pruned, 256, BFLOAT16), "narrow", narrow
        ),
    }
    dense_calls, pair_calls = [], []
    for _ in range(COPIES):
        stored = torch.from_numpy(shelf.place(bits(weight))).view(torch.bfloat16)
        whole = dense.DenseWeight(stored, 0, columns)
        ends = (places.data_ptr(), y.data_ptr(), 0, spmm.START_SUM)
        chunks = range(len(whole.chunk_rows) - 1)
        dense_calls.append([whole.operation(chunk, 4, *ends) for chunk in chunks])
        first = (stored.data_ptr(), columns // 2, rows)
        pair_calls.append([("pairs", *first, pairs.data_ptr(), y.data_ptr())])
        keep.append(stored)
    dense_ways = {"dense, X float32": dense_calls, "dense, vdpbf16ps": pair_calls}
    lines = []
    for matrix, ways in ((pruned, sparse_ways), (weight, dense_ways)):
        wanted = matrix @ x
        for way, copies in ways.items():
            y.zero_()
            for call in copies[0]:
                code.call(*call)
            expected = wanted[:, order] if "spmm 90 %, X bfloat16" in way else wanted
            np.testing.assert_allclose(y.numpy(), expected, atol=2e-3)
        times = timed(code, ways)
        base = next(iter(times.values()))
        for way, found in times.items():
            ratio, us = min(base) / min(found), min(found) * 1e6
            lines.append((f"{rows} x {columns}", way, f"{us:.0f}", f"{ratio:.2f}"))
    return lines


def main() -> None:
    """Measure and print."""
    if not llvm().get_host_cpu_features().get("avx512bf16"):
        raise SystemExit("this CPU has no AVX512_BF16.")
    target = named("avx512")
    torch.set_num_threads(1)
    kernels = [spmm.spmm(target, 1, 4, BFLOAT16), dense.dense(target, 4, BFLOAT16)]
    code = compile_kernels([*kernels, narrow_spmm(target), pair_dense(target)], target, None)
    print(machine())
    rows = [row for shape in SHAPES for row in run(code, *shape, target.widths[0])]
    print(format_table(("shape", "kernel", "us, 128 tokens", "float32 / it"), rows))


if __name__ == "__main__":
    main()
