"""Prune a model by every recipe in several processes; each saves what it has."""

from __future__ import annotations

import sys

from accelerate import Accelerator
from safetensors.torch import save_model

import hf_sparse
from tests.support.recipes import RECIPES
from tests.support.tiny_models import tiny_batches, tiny_model

accelerator = Accelerator(cpu=True)
for number, (pattern, sparsity, options) in enumerate(RECIPES):
    model = tiny_model("llama")
    config = hf_sparse.SparsityConfig(pattern, sparsity)
    batches = tiny_batches("llama", count=5)
    report = hf_sparse.prune_(model, config, batches=batches, accelerator=accelerator, **options)
    assert report.sparsity == 0.5 or abs(report.sparsity - 0.5) < 1e-3, report.sparsity
    name = f"{number}-of-{accelerator.num_processes}-{accelerator.process_index}"
    save_model(model, f"{sys.argv[1]}/{name}.safetensors")
