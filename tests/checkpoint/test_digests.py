"""Files whose tensors are not those that were saved are refused, where every count still fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import FormatError, SparsityConfig
from hf_sparse.checkpoint.digests import digest_of, digest_of_file
from tests.support.tiny_models import tiny_model

CONFIG = SparsityConfig("2:4")
NORM = "model.layers.0.input_layernorm.weight"
READERS = [AutoModelForCausalLM.from_pretrained, hf_sparse.inspect_checkpoint]


@pytest.fixture(params=["10GB", "60KB"], ids=["one file", "shards"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = tiny_model("llama")
    hf_sparse.prune_(model, CONFIG, "magnitude")
    return hf_sparse.save_pretrained(model, tmp_path, CONFIG, max_shard_size=request.param)


def rewritten(folder: Path, name: str, metadata: dict[str, str] | None) -> None:
    """Change one number of a tensor; None: the header's metadata stay."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            with safe_open(file, "pt") as reader:
                kept = reader.metadata()
            flat = tensors[name].reshape(-1)
            flat[0] = flat[0] + 1
            save_file(tensors, file, metadata=kept if metadata is None else metadata)


@pytest.mark.parametrize("name", [NORM, "model.layers.1.mlp.up_proj.weight"])
def test_a_changed_number_is_found(folder: Path, name: str) -> None:
    rewritten(folder, name, None)
    for read in READERS:
        with pytest.raises(FormatError, match="was changed since it was saved: its tensors have"):
            read(folder)


@pytest.mark.parametrize("folder", ["10GB"], indirect=True)
def test_files_without_digest_load(folder: Path) -> None:
    rewritten(folder, NORM, {"format": "pt"})
    for read in READERS:
        read(folder)


def test_the_digest_of_a_file_is_that_of_its_tensors(tmp_path: Path) -> None:
    """Also where the file has another order than names, and is cut off while it is read."""
    tensors = {
        "b.10": torch.randn(3, 5).bfloat16(),
        "b.2": torch.randn(201).to(torch.float8_e4m3fn),
        "a": torch.zeros(0, 7),
        "z": torch.tensor(3),
        "c": torch.randint(0, 256, (11,), dtype=torch.uint8),
    }
    save_file(tensors, file := tmp_path / "x.safetensors")
    with safe_open(file, "pt") as reader:
        assert list(reader.offset_keys()) != sorted(tensors)
        assert digest_of_file(file, reader) == digest_of(tensors)
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size - 5)
        assert digest_of_file(file, reader) != digest_of(tensors)


@pytest.mark.parametrize("entry", ["digests", "description", "weights"])
@pytest.mark.parametrize("what", ["number", "setting"])
def test_changed_compiled_models_are_found(tmp_path: Path, what: str, entry: str) -> None:
    model = hf_sparse.compile(tiny_model("llama", num_hidden_layers=1))
    hf_sparse.save_compiled(model, tmp_path)
    file, weights = tmp_path / "compiled.json", tmp_path / "compiled.safetensors"
    described: dict[str, Any] = json.loads(file.read_text())
    if what == "number":
        tensors = load_file(weights)
        tensors["model.model.embed_tokens.weight"][3, 0] += 1
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        described["generation"]["max_length"] = 77
    # An entry that is gone, or of which one part is, hides nothing but from who asks for it.
    if entry != "digests":
        described["digests"][entry] = "0" * 64
    file.write_text(json.dumps(described))
    with pytest.raises(FormatError, match="changed since the model was saved"):
        hf_sparse.load_compiled(tmp_path)
    if entry == "digests":
        del described["digests"]
        file.write_text(json.dumps(described))
        assert torch.is_tensor(hf_sparse.load_compiled(tmp_path)(torch.tensor([[1]])).logits)
