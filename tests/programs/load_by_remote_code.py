"""Load a sparse checkpoint by its own code alone; print the class and the sparsity of a weight."""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
weight = model.model.layers[0].mlp.up_proj.weight
print(type(model).__name__, float((weight == 0).float().mean()))
