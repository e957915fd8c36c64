"""Train a model with SparseAdamW and a Sparsifier, on one process, copies or shards."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from hf_sparse import SparseAdamW, Sparsifier, SparsityConfig, sparse_param_groups
from tests.support.sharding import sharded
from tests.support.tiny_models import tiny_model

folder, kind, pattern, method = sys.argv[1:]
accelerator = Accelerator(cpu=True)
model = tiny_model("llama", tie_word_embeddings=False)
config = SparsityConfig(pattern, None if ":" in pattern and pattern[0].isdigit() else 0.6)
if kind == "fsdp2":  # Accelerate has FSDP for accelerators only
    sharded(model, model.model.layers)
groups = sparse_param_groups(model, config)
optimizer = SparseAdamW(groups, lr=1e-3, penalty="l0", scale="adaptive")
if kind != "fsdp2":
    model, optimizer = accelerator.prepare(model, optimizer)
sparsifier = Sparsifier(optimizer, config, 12, method=method, interval=2)
generator = torch.Generator().manual_seed(0)
rank, size = accelerator.process_index, accelerator.num_processes
model.train()
for _ in range(12):
    ids = torch.randint(2, 256, (4, 12), generator=generator)[rank::size]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    sparsifier.step()
sparsifier.check()
state = accelerator.unwrap_model(model).state_dict()
state = {k: v.full_tensor() if kind == "fsdp2" else v for k, v in state.items()}
if accelerator.is_main_process:
    save_file({k: v.contiguous() for k, v in state.items()}, f"{folder}/{kind}.safetensors")
print("sparsity", sparsifier.sparsity)
