"""Models pruned with one pattern after another: all zeros are stored compressed and counted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import FormatError, SparsityConfig
from hf_sparse.cli import main
from hf_sparse.formats import compress, join
from hf_sparse.structure.layers import promised_config
from tests.support.tiny_models import tiny_batches, tiny_model

ATTENTION = ["self_attn.*"]
NETWORK = ["mlp.*"]
IN_TURN = {
    "heads, then neurons": [SparsityConfig("head", 0.5), SparsityConfig("column", 0.5)],
    "2:4, then single weights": [
        SparsityConfig("2:4", targets=NETWORK),
        SparsityConfig("unstructured", 0.7, targets=ATTENTION),
    ],
    "single weights, then 2:4": [
        SparsityConfig("unstructured", 0.4, targets=ATTENTION),
        SparsityConfig("2:4", targets=NETWORK),
    ],
}


def pruned(name: str, family: str = "llama", **changes: Any) -> Any:
    model = tiny_model(family, **changes)
    for config in IN_TURN[name]:
        hf_sparse.prune_(model, config, "magnitude")
    return model


def zeros_of(model: nn.Module) -> int:
    return sum(int((parameter == 0).sum()) for parameter in model.parameters())


@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_heads_and_then_neurons_are_all_compressed(tmp_path: Path, family: str) -> None:
    model = pruned("heads, then neurons", family)
    hf_sparse.save_pretrained(model, tmp_path / "sparse")
    found = hf_sparse.inspect_checkpoint(tmp_path / "sparse")
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and re.search(r"\.\d\.", name) is not None
        many = (parameter == 0).float().mean() > 0.1
        assert (found.formats.get(name, "dense") != "dense") == (matrix and bool(many)), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert str(found.config.pattern) == "column"
    assert found.report.violations == 0
    assert found.report.sparsity == 0.5
    # The same zeros as if every matrix were a target.
    every = SparsityConfig("unstructured", 0.1)
    hf_sparse.save_pretrained(model, tmp_path / "every", every)
    whole = hf_sparse.inspect_checkpoint(tmp_path / "every")
    assert found.file_bytes < 1.05 * whole.file_bytes


@pytest.mark.few(1)
@pytest.mark.parametrize("name", IN_TURN)
def test_zeros_of_the_whole_model_are_true_everywhere(tmp_path: Path, name: str) -> None:
    model = pruned(name)
    hf_sparse.save_pretrained(model, tmp_path)
    report = hf_sparse.measure_sparsity(model, promised_config(model))
    found = hf_sparse.inspect_checkpoint(tmp_path).report
    assert report.model_zeros == found.model_zeros == zeros_of(model)
    assert (report.pattern, report.zeros, report.violations) == (
        found.pattern,
        found.zeros,
        found.violations,
    )
    share = zeros_of(model) / sum(parameter.numel() for parameter in model.parameters())
    assert f"| zeros in the whole model | {share:.4f} |" in (tmp_path / "README.md").read_text()
    assert main(["inspect", str(tmp_path)]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert hf_sparse.measure_sparsity(loaded, promised_config(loaded)) == report
    everything = hf_sparse.measure_sparsity(loaded)
    assert everything == hf_sparse.measure_sparsity(model)
    assert everything.model_zeros == report.model_zeros
    assert (everything.pattern, everything.violations) == (report.pattern, report.violations)


def test_a_promise_is_checked_for_its_targets_alone(tmp_path: Path) -> None:
    model = pruned("single weights, then 2:4")
    hf_sparse.save_pretrained(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    attention = "model.layers.1.self_attn.q_proj.weight"
    assert f"{attention}.bitmask" in tensors  # breaks 2:4, and loads
    AutoModelForCausalLM.from_pretrained(tmp_path)
    network = "model.layers.1.mlp.up_proj.weight"
    broken = torch.ones(64, 32)
    broken[:, :12] = 0
    tensors = {key: value for key, value in tensors.items() if not key.startswith(network)}
    tensors |= {join(network, part): value for part, value in compress(broken).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(FormatError, match=r"mlp.up_proj.*320 groups have more than 2 nonzeros"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 1


def test_a_streamed_second_pruning_gives_the_same(tmp_path: Path) -> None:
    first, second = IN_TURN["single weights, then 2:4"]
    model = tiny_model("llama")
    hf_sparse.prune_(model, first, "magnitude")
    model.save_pretrained(tmp_path / "first")
    batches = tiny_batches("llama")
    streamed = hf_sparse.prune_checkpoint(
        tmp_path / "first", tmp_path / "a", second, batches=batches
    )
    report = hf_sparse.prune_(model, second, batches=batches)
    hf_sparse.save_pretrained(model, tmp_path / "b")
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in "ab"]
    assert files[0].keys() == files[1].keys()
    for name, value in files[0].items():
        assert torch.equal(value, files[1][name]), name
    assert streamed.tensors == report.tensors
    assert streamed.model_zeros == report.model_zeros == zeros_of(model)


def test_the_dense_format_keeps_them_in_place(tmp_path: Path) -> None:
    model = pruned("2:4, then single weights")
    config = SparsityConfig("unstructured", 0.7, targets=ATTENTION, format="dense")
    hf_sparse.save_pretrained(model, tmp_path, config)
    assert set(load_file(tmp_path / "model.safetensors")) <= set(model.state_dict())
    share = zeros_of(model) / sum(parameter.numel() for parameter in model.parameters())
    assert f"| zeros in the whole model | {share:.4f} |" in (tmp_path / "README.md").read_text()
    assert hf_sparse.inspect_checkpoint(tmp_path).report.model_zeros == zeros_of(model)


@pytest.mark.parametrize("method", ["finetune", "lora"])
def test_recovery_keeps_the_zeros_of_both(method: str) -> None:
    pytest.importorskip("peft")
    model = pruned("single weights, then 2:4")
    zeros = {name: value == 0 for name, value in model.state_dict().items() if "_proj" in name}
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    hf_sparse.recover_(model, tiny_batches("llama"), method, lr=1e-2, accumulate=1)
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)
    for name, places in zeros.items():
        assert torch.equal(model.state_dict()[name] == 0, places), name
