"""How fast attention is: GF/s of one core, softmax included, for each width of a tile.

    python benchmarks/attention.py                this CPU's best target
    python benchmarks/attention.py --target avx2

BERT-base's heads: 12 of 64 features, 128 keys, one tile of queries. Times are the least of many: other
programs only add to them.
"""

from __future__ import annotations

import argparse
import time

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", help="avx512, avx2 or portable; on ARM neon")
    args = parser.parse_args()

import numpy as np
import torch
from real_models import machine

from hf_sparse.counts import format_table
from hf_sparse.runtime.kernels import attention
from hf_sparse.runtime.kernels.all import kernels
from hf_sparse.runtime.kernels.call import run
from hf_sparse.runtime.llvm.jit import DEFAULT_CACHE
from hf_sparse.runtime.llvm.target import Target, named
from hf_sparse.runtime.weights.memory import aligned

HEADS, DIM, KEYS, REPEATS = 12, 64, 128, 300


def seconds(target: Target, vectors: int) -> float:
    """The least time of a tile of queries `vectors` vectors wide."""
    code, width, rows = kernels(target, DEFAULT_CACHE), target.widths[0], HEADS * DIM
    q = aligned(rows, vectors * target.lanes).normal_()
    out, tiles = aligned(*q.shape), aligned(KEYS // width, 2 * rows, width).normal_()
    table = np.array([(tile.data_ptr(), 4 * width, width) for tile in tiles], np.int64)
    mask = aligned(KEYS)
    operation = attention.SIGNATURE.operation(
        attention.name(vectors),
        q=q.data_ptr(),
        out=out.data_ptr(),
        heads=HEADS,
        head_dim=DIM,
        k_first=0,
        v_first=rows,
        group=1,
        table=table.ctypes.data,
        key_tiles=len(table),
        mask=mask.data_ptr(),
        key_count=KEYS,
        first_query=1 << 29,
        window=1 << 30,
        scale=DIM**-0.5,
    )
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run(code, operation)
        times.append(time.perf_counter() - start)
    return min(times)


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    target = named(args.target)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine(), target.name)
    rows = []
    for vectors in (4, 2, 1):
        queries, spent = vectors * target.lanes, seconds(target, vectors)
        work = 4 * HEADS * queries * KEYS * DIM
        rows.append((str(queries), f"{spent * 1e6:.0f}", f"{work / spent / 1e9:.1f}"))
    print(format_table(("queries", "us", "GF/s"), rows))


if __name__ == "__main__":
    main(args)
