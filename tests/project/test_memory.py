"""The memory bounds that the docstrings promise, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

START = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
import hf_sparse

torch.set_num_threads(1)

def memory(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

def extra(call):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    call()
    return (memory("VmHWM") - before) / 1e6
"""
SCRIPT = """
config = LlamaConfig(hidden_size=512, intermediate_size=1408, num_hidden_layers=24,
                     num_attention_heads=8, num_key_value_heads=8, vocab_size=256)
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
    lambda: hf_sparse.save_pretrained(model, folder, sparsity, max_shard_size="20MB"))
found["inspect"] = extra(lambda: hf_sparse.inspect_checkpoint(folder))
found["load"] = extra(lambda: AutoModelForCausalLM.from_pretrained(folder))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_nothing_holds_a_second_model(tmp_path: Path) -> None:
    command = [sys.executable, "-c", START + SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    hidden_states, largest_matrix = 16 * 256 * 512 * 4 / 1e6, 512 * 1408 * 4 / 1e6
    assert found["model"] > 300
    # The scores of one matrix: its magnitudes, their ranks and masks, and the inputs of one block.
    assert found["wanda"] < 2 * hidden_states + 16 * largest_matrix, found
    assert found["magnitude"] < 16 * largest_matrix, found
    assert found["save"] < 2 * 20 + 16 * largest_matrix, found  # one shard
    # The files are mapped into memory: what has been read counts until the system wants it back.
    mapped = 0.55 * found["model"]
    assert found["inspect"] < mapped + 16 * largest_matrix, found
    assert found["load"] < found["model"] + mapped + 16 * largest_matrix, found


ADAPTERS = """
import peft

def train(layers, adapt):
    config = LlamaConfig(hidden_size=512, intermediate_size=1408, num_hidden_layers=layers,
                         num_attention_heads=8, num_key_value_heads=8, vocab_size=256)
    torch.set_default_dtype(torch.bfloat16)  # at once: what is freed would hide what is needed
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    for block in model.model.layers:
        for parameter in block.parameters():
            parameter.data[..., ::2] *= parameter.ndim == 1
    found = {"model": model.get_memory_footprint() / 1e6}

    def steps():
        model_with = adapt(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        trained = [p for p in model_with.parameters() if p.requires_grad]
        found["adapters"] = sum(p.numel() for p in trained) * 4 / 1e6
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        for _ in range(2):
            ids = torch.arange(16)[None]
            model_with(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    found["extra"] = extra(steps)
    return found

adapt = hf_sparse.get_peft_model if sys.argv[1] == "masked" else peft.get_peft_model
train(1, adapt)
print(json.dumps(train(24, adapt)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_masked_lora_needs_little_more_than_stock_lora() -> None:
    pytest.importorskip("peft")
    # So that glibc gives back what is freed, and only what is needed counts.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    found = {}
    for kind in ("masked", "stock"):
        command = [sys.executable, "-c", START + ADAPTERS, kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    masked = found["masked"]
    assert masked["model"] > 150
    # The adapters, their gradients and moments, and some matrices of one layer.
    assert masked["extra"] < 4 * masked["adapters"] + 0.2 * masked["model"]
    assert masked["extra"] < found["stock"]["extra"] + 0.1 * masked["model"]
