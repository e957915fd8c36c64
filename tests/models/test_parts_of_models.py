"""Parts of models of images and text, which have no head: stored by themselves, and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedModel

import hf_sparse
from hf_sparse import SparsityConfig
from tests.support.any_models import build, tiny_config

torch.set_num_threads(1)


@pytest.mark.few(1)
@pytest.mark.parametrize("model_type", ["qwen2_vl", "gemma3", "blip-2"])
def test_every_part_comes_back_by_automodel(model_type: str, tmp_path: Path) -> None:
    config = tiny_config(model_type)
    model = build(config, AutoModelForImageTextToText._model_mapping[type(config)])
    hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5), "magnitude")
    hf_sparse.save_pretrained(model, tmp_path / "whole")
    parts = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, PreTrainedModel)
        and part.config is not model.config
        and not type(part).__name__.endswith(("ForCausalLM", "Decoder"))
    }
    assert len(parts) >= 2
    loaded = {"whole": AutoModel.from_pretrained(tmp_path / "whole")}
    expected = {"whole": model.model if hasattr(model, "model") else model}
    for name, part in parts.items():
        hf_sparse.save_pretrained(part, tmp_path / name)
        loaded[name], expected[name] = AutoModel.from_pretrained(tmp_path / name), part
        assert type(loaded[name]).__name__ == f"Sparse{type(part).__name__}"
        assert hf_sparse.inspect_checkpoint(tmp_path / name).report.sparsity >= 0.49
    for name, part in expected.items():
        found = loaded[name].state_dict()
        for key, value in part.state_dict().items():
            if key in found or name != "whole":
                assert torch.equal(value, found[key]), (name, key)
