"""Prune a checkpoint from disk to disk and print the most memory that this took, in bytes."""

from __future__ import annotations

import sys

import torch

import hf_sparse
from tests.support.peak_memory import memory

torch.set_num_threads(1)
batches = [
    torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(i)) for i in range(4)
]
config = hf_sparse.SparsityConfig("2:4")
hf_sparse.prune_checkpoint(sys.argv[1], sys.argv[2], config, "sparsegpt", batches)
print(memory("VmHWM"))
