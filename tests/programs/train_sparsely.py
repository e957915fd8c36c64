"""Train a model with SparseAdamW and a Sparsifier, on one process, copies or shards."""

from __future__ import annotations

import sys

from accelerate import Accelerator
from torch import nn

from hf_sparse import SparseAdamW, Sparsifier, SparsityConfig, sparse_param_groups
from tests.support.tiny_models import tiny_model
from tests.support.training import prepared, save_whole, train

folder, kind, pattern, method = sys.argv[1:]
accelerator = Accelerator(cpu=True)
model = tiny_model("llama", tie_word_embeddings=False)
config = SparsityConfig(pattern, None if ":" in pattern and pattern[0].isdigit() else 0.6)


def optimizer_of(model: nn.Module) -> SparseAdamW:
    groups = sparse_param_groups(model, config)
    return SparseAdamW(groups, lr=1e-3, penalty="l0", scale="adaptive")


model, optimizer = prepared(accelerator, kind, model, optimizer_of)
sparsifier = Sparsifier(optimizer, config, 12, method=method, interval=2)
for _ in train(accelerator, model, optimizer, 12):
    sparsifier.step()
sparsifier.check()
save_whole(accelerator, model, f"{folder}/{kind}.safetensors")
print("sparsity", sparsifier.sparsity)
