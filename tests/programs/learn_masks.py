"""Prune a model on copies or shards and print the notes of the report."""

from __future__ import annotations

import sys

from accelerate import Accelerator

import hf_sparse
from tests.support.sharding import sharded
from tests.support.tiny_models import tiny_batches, tiny_model

kind, method = sys.argv[1:]
accelerator = Accelerator(cpu=True)
model = tiny_model("llama", tie_word_embeddings=False)
if kind == "fsdp2":
    sharded(model, model.model.layers)
batches = tiny_batches("llama", count=4)
options = {"accumulate": 1, "lam": 0.3, "epochs": 4} if method == "proxsparse" else {}
config = hf_sparse.SparsityConfig("2:4")
report = hf_sparse.prune_(model, config, method, batches, accelerator, **options)
assert report.sparsity == 0.5, report.sparsity
assert report.violations == 0
if accelerator.is_main_process:
    print("notes", *report.notes)
