"""What weights of two bytes, and codes of few bits, give each kernel: its time against float32's, on
one thread.

    python benchmarks/weight_types.py            this CPU's best target
    python benchmarks/weight_types.py --target avx2

One row for each kernel and type: microseconds, and how much faster than float32 it is. Several
copies of a weight take turns, so that it comes from memory, as it does in a model. Times are the
least of many: other programs only add to them.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", help="avx512, avx2 or portable; on ARM neon")
    args = parser.parse_args()

import numpy as np
import torch
from real_models import machine

from hf_sparse.counts import format_table
from hf_sparse.runtime.kernels import spmm
from hf_sparse.runtime.kernels.all import kernels
from hf_sparse.runtime.kernels.byte_tiles import QUANTISE_TILE, record_features
from hf_sparse.runtime.kernels.call import Operation, run
from hf_sparse.runtime.kernels.code_formats import FORMATS
from hf_sparse.runtime.kernels.single_token import DENSE_ROWS, GROUP, SPARSE_ROWS
from hf_sparse.runtime.kernels.weight_types import FLOAT32, WEIGHT_TYPES, WeightType
from hf_sparse.runtime.llvm.jit import DEFAULT_CACHE
from hf_sparse.runtime.llvm.target import Target, named
from hf_sparse.runtime.weights.code_part import CodePart
from hf_sparse.runtime.weights.codes import on, pack_codes
from hf_sparse.runtime.weights.dense_weight import DenseWeight
from hf_sparse.runtime.weights.memory import Shelf, aligned
from hf_sparse.runtime.weights.panels import pack
from hf_sparse.runtime.weights.rows import pack_decode

ROWS, COLUMNS = 768, 768
REPEATS, COPIES = 96, 24


def operations(
    kind: str, weight: np.ndarray, kept: WeightType, width: int
) -> tuple[list[Operation], object]:
    """The same multiplication with each of the copies, and what they point into."""
    shelf = Shelf()
    x, y = aligned(COLUMNS, width).fill_(1.0), aligned(ROWS, width)
    ends = {"x": x.data_ptr(), "y": y.data_ptr(), "bias": 0}
    found: list[Operation] = []
    copies: list[Any] = []
    groups = ROWS // GROUP
    dense, single = kept.narrow(weight), pack_decode(weight, kept)
    tile = pack(weight, int(kind[-1]), kept) if kind.startswith("tile, blocks") else None
    for _ in range(COPIES):
        if tile is not None:
            copies.append(tile.on(shelf))
            found.append(copies[-1].operation(0, 4, **ends, start=spmm.START_SUM))
        elif kind == "one token, sparse":
            copies.append(single.on(shelf))
            found.append(
                SPARSE_ROWS.operation(
                    f"sparse_rows{kept.suffix}",
                    words=copies[-1].words.ctypes.data,
                    values=copies[-1].values.ctypes.data,
                    row_words=single.words.shape[1],
                    groups=groups,
                    add=0,
                    **ends,
                )
            )
        else:
            copies.append(
                DenseWeight(torch.from_numpy(shelf.place(dense)).view(kept.dtype), 0, COLUMNS)
            )
            if kind == "tile, dense":
                found.append(copies[-1].operation(0, 4, **ends, start=spmm.START_SUM))
                continue
            found.append(
                DENSE_ROWS.operation(
                    f"dense_rows{kept.suffix}",
                    weight=copies[-1].weight.data_ptr(),
                    row_bytes=kept.size * COLUMNS,
                    columns=COLUMNS,
                    groups=groups,
                    add=0,
                    **ends,
                )
            )
    return found, (copies, x, y)


def compare(kind: str, sparsity: float, target: Target) -> list[tuple[str, ...]]:
    """A row for each type of weights."""
    random = np.random.default_rng(0)
    height = int(kind[-1]) if kind.startswith("tile, blocks") else 1
    kept_blocks = random.random((ROWS // height, COLUMNS)) >= sparsity
    values = random.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    weight = torch.from_numpy(values * np.repeat(kept_blocks, height, axis=0)).bfloat16().float()
    ready = {}
    for kept in WEIGHT_TYPES.values():
        code = kernels(target, DEFAULT_CACHE, kept)
        ready[kept] = (code, *operations(kind, weight.numpy(), kept, target.widths[0]))
    times: dict[WeightType, list[float]] = {kept: [] for kept in ready}
    for turn in range(REPEATS):
        for kept, (code, found, _) in ready.items():
            start = time.perf_counter()
            run(code, found[turn % COPIES])
            times[kept].append(time.perf_counter() - start)
    wide = times[FLOAT32]
    return [
        (
            kind,
            f"{100 * sparsity:.0f} %",
            str(kept.dtype).removeprefix("torch."),
            f"{min(found) * 1e6:.0f}",
            f"{min(wide) / min(found):.2f}",
        )
        for kept, found in times.items()
    ]


def of_codes(target: Target) -> list[tuple[str, ...]]:
    """A row for each format of codes that a tile is multiplied with, beside the dense kernel.

    The time of codes has that of putting the tile in eight bits, which weights that share it share.
    """
    random = np.random.default_rng(0)
    x, y = (aligned(size, target.widths[0]).fill_(1.0) for size in (COLUMNS, ROWS))
    records = aligned(record_features(COLUMNS), target.widths[0])
    ends = {"y": y.data_ptr(), "bias": 0}
    code, shelf = kernels(target, DEFAULT_CACHE, codes=True), Shelf()
    quantise = QUANTISE_TILE.operation(
        "quantise_tile4", x=x.data_ptr(), records=records.data_ptr(), columns=COLUMNS
    )
    ready: dict[str, list[Any]] = {
        "float32": [
            DenseWeight(
                torch.from_numpy(shelf.place(np.ones((ROWS, COLUMNS), np.float32))), 0, COLUMNS
            )
            for _ in range(COPIES)
        ]
    }
    for form in (one for one in FORMATS if one.group == (64 if one.bits == 8 else 32)):
        codes = random.integers(-7, 8, (ROWS, COLUMNS)).astype(np.int8)
        windows = random.random((ROWS, COLUMNS // form.window, form.window)).argsort(axis=-1)
        gone = random.random(codes.shape) < 0.5 if form.is_masked else windows >= form.kept
        codes[gone.reshape(codes.shape)] = 0
        scales = np.ones((ROWS, COLUMNS // form.group), np.float32)
        packed = pack_codes(codes, scales, form.group, form)
        ready[form.name] = [CodePart(on(packed, shelf), 0, COLUMNS) for _ in range(COPIES)]
    times: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(REPEATS):
        for name, copies in ready.items():
            source = x if name == "float32" else records
            operation = copies[turn % COPIES].operation(
                0, 4, x=source.data_ptr(), **ends, start=spmm.START_SUM
            )
            start = time.perf_counter()
            if name != "float32":
                run(code, quantise)
            run(code, operation)
            times[name].append(time.perf_counter() - start)
    wide = min(times["float32"])
    return [
        ("tile, codes", "", name, f"{min(found) * 1e6:.0f}", f"{wide / min(found):.2f}")
        for name, found in times.items()
    ]


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    target = named(args.target)
    torch.set_num_threads(1)
    print(machine(), target.name)
    cases = [("tile, dense", (0.0,)), ("one token, dense", (0.0,))]
    cases += [(f"tile, blocks of {height}", (0.5, 0.9)) for height in spmm.UNROLL]
    cases += [("one token, sparse", (0.3, 0.5, 0.6, 0.7, 0.9))]
    rows = [
        row for kind, levels in cases for level in levels for row in compare(kind, level, target)
    ]
    rows += of_codes(target)
    print(format_table((f"{ROWS} x {COLUMNS}", "zeros", "weights", "us", "float32 / it"), rows))


if __name__ == "__main__":
    main(args)
