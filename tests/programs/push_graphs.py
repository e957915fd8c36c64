"""Push a sparse model with its ONNX graph, open the graph, and push without it."""

from __future__ import annotations

import sys
from typing import Any

import huggingface_hub
import transformers
from transformers.exporters.base import ExportedModel

import hf_sparse
from hf_sparse.cli import main
from tests.support.tiny_models import tiny_model, tiny_tokenizer

model = tiny_model("llama")
model.config.name_or_path = "someone/tiny-llama"
config = hf_sparse.SparsityConfig("2:4")
hf_sparse.prune_(model, config, "magnitude")
hf_sparse.push_to_hub(
    model, "user/tiny-sparse", config, tokenizer=tiny_tokenizer(), onnx=True, max_shard_size="20KB"
)
exported: Any = ExportedModel.from_pretrained("user/tiny-sparse", subfolder="onnx")
assert exported.config.model_type == "llama"

pulled: Any = transformers.AutoModelForCausalLM.from_pretrained("user/tiny-sparse")
pulled.push_to_hub("user/tiny-sparse", commit_message="One file", tokenizer=tiny_tokenizer())
pulled.save_pretrained(sys.argv[1])
for _ in range(2):
    assert main(["push", sys.argv[1], "user/graph", "--onnx", "--json"]) == 0
api = huggingface_hub.HfApi()
graph = set(api.list_repo_files("user/graph"))
assert {"onnx/model.onnx", "onnx/export.json", "onnx/config.json"} <= graph

other = tiny_model("llama", seed=3)
hf_sparse.prune_(other, config, "magnitude")
hf_sparse.save_pretrained(other, sys.argv[1] + "-other", config)
api.upload_file(path_or_fileobj=b"mine", path_in_repo="onnx/mine.txt", repo_id="user/graph")
assert main(["push", sys.argv[1] + "-other", "user/graph"]) == 0
print("PULLED")
