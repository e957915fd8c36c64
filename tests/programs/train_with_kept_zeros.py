"""Train a pruned model whose zeros are kept, on one process, copies or shards."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

import hf_sparse
from tests.support.sharding import sharded
from tests.support.tiny_models import tiny_model

folder, kind = sys.argv[1:]
accelerator = Accelerator(cpu=True)
model = tiny_model("llama", tie_word_embeddings=False)
hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.6), "magnitude")
if kind == "fsdp2":
    sharded(model, model.model.layers)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)
if kind != "fsdp2":
    model, optimizer = accelerator.prepare(model, optimizer)
mask = hf_sparse.keep_zeros_(optimizer, model)
generator = torch.Generator().manual_seed(0)
rank, size = accelerator.process_index, accelerator.num_processes
model.train()
for _ in range(6):
    ids = torch.randint(2, 256, (4, 12), generator=generator)[rank::size]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
mask.check()
state = accelerator.unwrap_model(model).state_dict()
state = {k: v.full_tensor() if kind == "fsdp2" else v for k, v in state.items()}
if accelerator.is_main_process:
    save_file({k: v.contiguous() for k, v in state.items()}, f"{folder}/{kind}.safetensors")
accelerator.wait_for_everyone()
accelerator.end_training()
