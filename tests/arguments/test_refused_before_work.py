"""Shapes that do not fit, tokens beyond the vocabulary, and modes without gradients: told at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hf_sparse
from hf_sparse import FormatError, SparsityConfig
from hf_sparse.checkpoint import reading
from hf_sparse.cli import main
from hf_sparse.pruning.methods import METHODS
from tests.support.tiny_models import CONFIGS, tiny_batches, tiny_model

CONFIG = SparsityConfig("2:4")
NEEDING_GRADIENTS = {"taylor", "proxsparse", "sparsellm"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_model("llama")
    hf_sparse.prune_(model, CONFIG, "magnitude")
    return hf_sparse.save_pretrained(model, tmp_path / "saved")


def refuse(*_: Any) -> Any:
    raise AssertionError("a tensor was decompressed")


def test_a_padding_token_beyond_the_vocabulary_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": 10**6}))
    with pytest.raises(FormatError, match=r"config\.json: it describes no model.*[Pp]adding"):
        hf_sparse.inspect_checkpoint(folder)
    assert main(["inspect", str(folder)]) == 1
    assert "describes no model" in capsys.readouterr().err


def test_a_state_dict_of_other_shapes_is_refused_before_it_is_decompressed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = load_file(folder / "model.safetensors")
    config = type(CONFIGS["llama"])(**{**CONFIGS["llama"].to_dict(), "intermediate_size": 32})
    other = hf_sparse.SparseLlamaForCausalLM(hf_sparse.SparseLlamaConfig(**config.to_dict()))
    monkeypatch.setattr(reading, "decompress", refuse)
    wanted = r"model\.layers\.0\.mlp\.\w+\.weight: shape mismatch: .* is stored, the model wants"
    mlp = {name: value for name, value in stored.items() if ".mlp." in name}
    with pytest.raises(FormatError, match=wanted):
        other.load_state_dict(mlp, strict=False)


def test_compressed_tensors_that_a_model_does_not_have_are_not_decompressed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = load_file(folder / "model.safetensors")
    config = {**CONFIGS["llama"].to_dict(), "num_hidden_layers": 1}
    other = hf_sparse.SparseLlamaForCausalLM(hf_sparse.SparseLlamaConfig(**config))
    later = {name: value for name, value in stored.items() if ".layers.2." in name}
    monkeypatch.setattr(reading, "decompress", refuse)
    assert other.load_state_dict(later, strict=False).unexpected_keys
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(later)


@pytest.mark.few(2)
@pytest.mark.parametrize("method", METHODS)
def test_methods_in_inference_mode_work_or_say_that_they_need_gradients(method: str) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        if method not in NEEDING_GRADIENTS:
            report = hf_sparse.prune_(model, CONFIG, method, tiny_batches("llama"))
            assert report.sparsity == 0.5
            return
        with pytest.raises(ValueError, match=r"no gradients inside torch\.inference_mode"):
            hf_sparse.prune_(model, CONFIG, method, tiny_batches("llama"))
    assert all((model.state_dict()[name] == value).all() for name, value in before.items())
