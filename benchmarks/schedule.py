"""What sharing the work among threads can give at best: speed-up and imbalance, by arithmetic.

    python benchmarks/schedule.py                  this CPU's best target
    python benchmarks/schedule.py --target avx2

Nothing is timed. Tiles go to threads as `programs/tiling.py` shares them, whose cost of narrow tiles
is counted; rows of single tokens as `weights/rows.py` shares them, in each of a block's phases, whose
time is that of the thread with the most. Memory, caches and barriers are not in it. Speed-up: over
one thread. Imbalance: the most of a thread over the mean.
"""

from __future__ import annotations

import argparse

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", help="avx512, avx2 or portable")
    args = parser.parse_args()

from real_models import machine

from hf_sparse.counts import format_table
from hf_sparse.runtime.llvm.target import Target, named
from hf_sparse.runtime.programs.tiling import cut, share
from hf_sparse.runtime.weights.rows import share_rows

THREADS = (1, 2, 4, 8, 16, 32, 64)
INPUTS = ((8, 128), (1, 128), (1, 384), (4, 512))
# Rows and columns of the phases of a block: queries, keys and values; their projection; the
# perceptron's first layers; its last.
DECODERS = {
    "SmolLM2-135M": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
    "Llama of 1 B": ((2560, 2048), (2048, 2048), (11264, 2048), (2048, 5632)),
}


def of_tiles(target: Target, batch: int, tokens: int, threads: int) -> tuple[float, float]:
    """Speed-up and imbalance of many tokens."""
    whole = [tile for b in range(batch) for tile in cut(b, tokens, target.widths)]
    costs = [sum(tile.cost for tile in part) for part in share(whole, threads)]
    return sum(tile.cost for tile in whole) / max(costs), max(costs) * threads / sum(costs)


def of_rows(phases: tuple[tuple[int, int], ...], threads: int) -> tuple[float, float]:
    """Speed-up and imbalance of one token."""
    work = sum(rows * columns for rows, columns in phases)
    most = sum(
        columns * max(last - first for first, last in share_rows(rows, threads))
        for rows, columns in phases
    )
    return work / most, most * threads / work


def main(args: argparse.Namespace) -> None:
    """Compute and print."""
    target = named(args.target)
    print(machine(), target.name)
    rows = []
    for batch, tokens in INPUTS:
        found = [of_tiles(target, batch, tokens, threads) for threads in THREADS]
        rows.append((f"{batch} x {tokens}", found))
    for name, phases in DECODERS.items():
        rows.append((f"one token, {name}", [of_rows(phases, threads) for threads in THREADS]))
    table = [
        (name, *(f"{gain:.1f} ({imbalance:.2f})" for gain, imbalance in found))
        for name, found in rows
    ]
    head = ("speed-up (imbalance), threads", *map(str, THREADS))
    print(format_table(head, table))


if __name__ == "__main__":
    main(args)
