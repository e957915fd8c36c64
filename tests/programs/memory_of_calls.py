"""Print the memory that pruning, saving and loading take, as JSON."""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from tests.support.peak_memory import extra
from tests.support.tiny_models import tiny_model

torch.set_num_threads(1)

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "max_position_embeddings": 2048}
model = tiny_model("llama", **SIZES, num_hidden_layers=24)
batches = [torch.randint(0, 256, (1, 256)) for _ in range(16)]
sparsity = hf_sparse.SparsityConfig("unstructured", 0.5)
small = tiny_model("llama", **SIZES, num_hidden_layers=1)
hf_sparse.prune_(small, sparsity, "wanda", batches[:1])  # libraries are loaded and warm
hf_sparse.save_pretrained(small, sys.argv[1] + "/small", sparsity)

found = {"model": model.get_memory_footprint() / 1e6}
found["wanda"] = extra(lambda: hf_sparse.prune_(model, sparsity, "wanda", batches))
found["magnitude"] = extra(lambda: hf_sparse.prune_(model, sparsity, "magnitude", scope="global"))
folder = sys.argv[1] + "/model"
found["save"] = extra(
    lambda: hf_sparse.save_pretrained(model, folder, sparsity, max_shard_size="20MB")
)
found["inspect"] = extra(lambda: hf_sparse.inspect_checkpoint(folder))
found["load"] = extra(lambda: AutoModelForCausalLM.from_pretrained(folder))
print(json.dumps(found))
