"""Print the modules that making, pruning and saving a model load."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import hf_sparse

config = hf_sparse.SparseBertConfig(
    hidden_size=8,
    num_attention_heads=2,
    vocab_size=9,
    intermediate_size=16,
    num_hidden_layers=1,
)
model = hf_sparse.SparseBertModel(config)
batches = [torch.ones(1, 4, dtype=torch.long)]
sparsity = hf_sparse.SparsityConfig("2:4")
hf_sparse.prune_(model, sparsity, "wanda", batches)
hf_sparse.save_pretrained(model, Path(sys.argv[1]), sparsity)
print(*sys.modules)
