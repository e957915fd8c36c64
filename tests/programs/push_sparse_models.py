"""Push sparse models and adapters, and pull them again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import torch
import transformers

import hf_sparse
from hf_sparse.cli import main
from tests.support.tiny_models import tiny_model, tiny_tokenizer

model = tiny_model("llama")
model.config.name_or_path = "someone/tiny-llama"
config = hf_sparse.SparsityConfig("2:4")
report = hf_sparse.prune_(model, config, "magnitude")
metrics = [hf_sparse.Metric("perplexity, prose", 12.5, 11.25)]
hf_sparse.push_to_hub(
    model,
    "user/tiny-sparse",
    config,
    tokenizer=tiny_tokenizer(),
    report=report,
    metrics=metrics,
    tags=["tiny"],
    max_shard_size="20KB",
)

pulled: Any = transformers.AutoModelForCausalLM.from_pretrained("user/tiny-sparse")
assert type(pulled).__name__ == "SparseLlamaForCausalLM", type(pulled)
for name, value in model.state_dict().items():
    assert torch.equal(value, pulled.state_dict()[name]), name
tokenizer = transformers.AutoTokenizer.from_pretrained("user/tiny-sparse")
assert tokenizer("prose")["input_ids"] == tiny_tokenizer()("prose")["input_ids"]

pulled.push_to_hub("user/tiny-sparse", commit_message="One file", tokenizer=tokenizer)
pulled.save_pretrained(sys.argv[1], push_to_hub=True, repo_id="user/other")

assert main(["push", sys.argv[1], "user/third", "--json"]) == 0
again = transformers.AutoModelForCausalLM.from_pretrained("user/third")
assert torch.equal(again.model.norm.weight, model.model.norm.weight)

adapted = hf_sparse.get_peft_model(pulled, peft.LoraConfig(r=2, init_lora_weights=False))
hf_sparse.push_to_hub(adapted, "user/recovered", config)
merged = transformers.AutoModelForCausalLM.from_pretrained("user/recovered")
ids = torch.arange(2, 9)[None]
assert torch.allclose(merged(ids).logits, adapted.eval()(ids).logits, atol=1e-5)
assert hf_sparse.measure_sparsity(merged).zeros == hf_sparse.measure_sparsity(model).zeros

hf_sparse.save_pretrained(merged, sys.argv[1] + "-base", config, tokenizer=tiny_tokenizer())
base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + "-base")
adapted = hf_sparse.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False)).eval()
adapter = sys.argv[1] + "-adapter"
adapted.save_pretrained(adapter)
assert main(["push", adapter, "user/pushed", "--json"]) == 0
merged = transformers.AutoModelForCausalLM.from_pretrained("user/pushed")
assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
assert hf_sparse.measure_sparsity(merged).zeros == hf_sparse.measure_sparsity(model).zeros
assert len(transformers.AutoTokenizer.from_pretrained("user/pushed")) == 256

other = tiny_model("llama", seed=3)
hf_sparse.prune_(other, config, "magnitude")
hf_sparse.save_pretrained(other, sys.argv[1] + "-other", config)
assert main(["push", adapter, "user/never", "--base", sys.argv[1] + "-other"]) == 1
assert main(["push", sys.argv[1], "user/never", "--base", sys.argv[1]]) == 1
Path(sys.argv[1] + "-base").rename(sys.argv[1] + "-moved")
assert main(["push", adapter, "user/never"]) == 1
assert main(["push", adapter, "user/moved", "--base", sys.argv[1] + "-moved"]) == 0

api = huggingface_hub.HfApi()
foreign = ("export.json", "model.onnx", "README.md")
for name in foreign:
    api.upload_file(path_or_fileobj=b"{}", path_in_repo=f"onnx/{name}", repo_id="user/moved")
hf_sparse.push_to_hub(other, "user/moved", config)
print("PULLED")
