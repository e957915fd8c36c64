"""`inspect_checkpoint` of dense folders: what it counts is what pruning would make sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.checkpoint.inspect import inspect_checkpoint
from tests.support.any_models import build, classes_of, has_blocks, tiny_config


def model_of(model_type: str) -> Any:
    """A random model of the kind that is usually stored."""
    config = tiny_config(model_type)
    known = classes_of(config)
    usual = (each for each in known if each.__name__.endswith(("CausalLM", "Generation")))
    return build(config, next(usual, known[0]))


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "model_type",
    [
        "mamba",  # convolutions and parameters of its own in numbered blocks
        "qwen2_vl",  # numbered matrices outside the blocks
        "resnet",  # no matrices, and buffers
        "deepseek_v3",  # buffers that a router adds
        "mixtral",  # stores experts one by one, under other names, and a router
        "t5",  # one matrix under several names
    ],
)
def test_targets_and_what_is_left_out_are_the_whole(model_type: str, tmp_path: Path) -> None:
    model = model_of(model_type)
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    candidates = found.candidates
    assert candidates is not None
    left = sum(each.weights for each in candidates.left_out)
    assert candidates.target_weights + left == candidates.weights
    assert found.report.parameters == candidates.weights == model.num_parameters()
    assert found.report.numel == candidates.target_weights
    assert not str(found).partition("\n")[0].endswith("; ")
    if has_blocks(model.config, type(model)):
        pruned = hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5), "magnitude")
        assert candidates.target_weights == pruned.numel


def test_a_compressed_folder_counts_the_same_weights(tmp_path: Path) -> None:
    model = model_of("deepseek_v3")
    pruned = hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5), "magnitude")
    hf_sparse.save_pretrained(model, tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert found.report.parameters == model.num_parameters()
    assert (found.report.numel, found.report.zeros) == (pruned.numel, pruned.zeros)
