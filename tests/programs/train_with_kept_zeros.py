"""Train a pruned model whose zeros are kept, on one process, copies or shards."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator

import hf_sparse
from tests.support.tiny_models import tiny_model
from tests.support.training import prepared, save_whole, train

folder, kind = sys.argv[1:]
accelerator = Accelerator(cpu=True)
model = tiny_model("llama", tie_word_embeddings=False)
hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.6), "magnitude")
model, optimizer = prepared(
    accelerator,
    kind,
    model,
    lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.3),
)
mask = hf_sparse.keep_zeros_(optimizer, model)
for _ in train(accelerator, model, optimizer, 6):
    mask.check()
save_whole(accelerator, model, f"{folder}/{kind}.safetensors")
accelerator.wait_for_everyone()
accelerator.end_training()
