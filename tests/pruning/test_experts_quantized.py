"""Quantized experts: read where transformers restores their floats, and refused elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.structure.layers import block_layers
from tests.support.mixtures import mixture_batches, tiny_mixture


def quantized_checkpoint(folder: Path) -> Path:
    """A mixture of which every matrix of the blocks is in FP8 with one scale."""
    tiny_mixture("qwen3_moe").save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name] = tensor
        if tensor.ndim == 2 and ".layers." in name and "gate.weight" not in name:
            scale = tensor.abs().max() / 448
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    tell(folder, method | {"activation_scheme": "dynamic"})
    return folder


def tell(folder: Path, method: dict[str, Any]) -> None:
    values = json.loads((folder / "config.json").read_text())
    text = json.dumps({**values, "quantization_config": method})
    (folder / "config.json").write_text(text)


def test_experts_in_fp8_are_pruned_as_the_floats_that_they_stand_for(tmp_path: Path) -> None:
    source = quantized_checkpoint(tmp_path / "fp8")
    config = SparsityConfig("2:4")
    floats = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    report = hf_sparse.prune_(floats, config, "wanda", mixture_batches())
    streamed = hf_sparse.prune_checkpoint(
        source, tmp_path / "sparse", config, "wanda", mixture_batches()
    )
    assert streamed.tensors == report.tensors
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for one, other in zip(block_layers(back), block_layers(floats), strict=True):
        assert torch.equal(one.weight == 0, other.weight == 0), one.name
    assert "quantization_config" not in back.config.to_dict()


def test_a_checkpoint_that_cannot_be_restored_is_refused_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    source = quantized_checkpoint(tmp_path / "dense")
    tell(source, {"quant_method": "hqq", "skip_modules": []})
    with pytest.raises(ValueError, match=r"quantized with hqq.* model.dequantize\(\)"):
        hf_sparse.prune_checkpoint(
            source, tmp_path / "sparse", SparsityConfig("2:4"), "wanda", mixture_batches()
        )
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_quantized_model_is_refused_before_anything_changes() -> None:
    model = tiny_mixture("gpt_oss")
    model.hf_quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(quant_method=SimpleNamespace(value="mxfp4"))
    )
    with pytest.raises(ValueError, match=r"quantized with mxfp4.*Mxfp4Config\(dequantize=True\)"):
        hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
