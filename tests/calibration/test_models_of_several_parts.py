"""Calibration of models whose blocks return more, or that have more parts, than a language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM

import hf_sparse
from hf_sparse import SparsityConfig
from tests.support.any_models import tiny_config


def text(model: Any, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 20, (2, 12), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_blocks_that_return_a_tuple_are_calibrated_on_several_batches() -> None:
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(tiny_config("deberta-v2")).eval()
    batches = [text(model, seed) for seed in range(3)]
    report = hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5), "wanda", batches)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


def test_a_part_without_targets_need_not_be_called() -> None:
    torch.manual_seed(0)
    whole = AutoModel.from_config(tiny_config("clip")).eval()
    config = SparsityConfig("unstructured", 0.5, ignore=("vision_model.*",))
    image = torch.zeros(2, 3, *[whole.config.vision_config.image_size] * 2)
    batches = [{**text(whole, seed), "pixel_values": image} for seed in range(2)]
    hf_sparse.prune_(whole, config, "wanda", batches)
    name = "encoder.layers.0.mlp.fc1.weight"
    assert (whole.get_parameter(f"text_model.{name}") == 0).float().mean() > 0.49
    assert (whole.get_parameter(f"vision_model.{name}") == 0).float().mean() < 0.01


def test_a_class_of_ones_own_is_told_when_another_one_is_loaded(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    from tests.support.tiny_models import CONFIGS

    class MyScaled(LlamaForCausalLM):
        pass

    model = MyScaled(CONFIGS["llama"]).eval()
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4"))
    with pytest.warns(UserWarning, match="SparseMyScaled, which transformers does not have"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
