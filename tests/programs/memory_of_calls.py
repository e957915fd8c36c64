"""Print the memory that pruning, saving and loading take, as JSON."""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_sparse
from tests.support.peak_memory import extra

torch.set_num_threads(1)

config = LlamaConfig(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=24,
    num_attention_heads=8,
    num_key_value_heads=8,
    vocab_size=256,
)
model = LlamaForCausalLM(config)
batches = [torch.randint(0, 256, (1, 256)) for _ in range(16)]
sparsity = hf_sparse.SparsityConfig("unstructured", 0.5)
small = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 1}))
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
