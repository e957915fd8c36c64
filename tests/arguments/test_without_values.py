"""Models without values (on the meta device, or left on the disk) are refused by name of the weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from torch import nn

import hf_sparse
from hf_sparse import SparsityConfig
from tests.support.exporting import skip_unless_exports
from tests.support.tiny_models import (
    prose,
    tiny_batches,
    tiny_classifier,
    tiny_model,
    tiny_tokenizer,
)

CONFIG = SparsityConfig("2:4")


def sparse_model() -> Any:
    model = tiny_model("llama")
    hf_sparse.prune_(model, CONFIG, "magnitude")
    return model


CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "prune_": lambda model, _: hf_sparse.prune_(model, CONFIG, "magnitude"),
    "measure_sparsity": lambda model, _: hf_sparse.measure_sparsity(model),
    "recover_": lambda model, _: hf_sparse.recover_(model, tiny_batches("llama")),
    "teacher": lambda model, _: hf_sparse.recover_(
        sparse_model(), tiny_batches("llama"), teacher=model
    ),
    "keep_zeros_": lambda model, _: hf_sparse.keep_zeros_(
        torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0), model
    ),
    "get_peft_model": lambda model, _: hf_sparse.get_peft_model(
        model, peft.LoraConfig(target_modules=["up_proj"])
    ),
    "load_adapter": lambda model, folder: hf_sparse.load_adapter(model, folder),
    "Distillation": lambda model, _: hf_sparse.Distillation(model),
    "allocate": lambda model, _: hf_sparse.allocate(model, 0.5),
    "perplexity": lambda model, _: hf_sparse.perplexity(
        model, tiny_tokenizer(), prose()[:2000], 16
    ),
    "accuracy": lambda model, _: hf_sparse.accuracy(model, tiny_tokenizer(), ["a"], [0]),
    "save_pretrained": lambda model, folder: hf_sparse.save_pretrained(model, folder, CONFIG),
    "drop_blocks_": lambda model, _: hf_sparse.drop_blocks_(model, 1, tiny_batches("llama")),
    "drop_experts_": lambda model, _: hf_sparse.drop_experts_(model, 1, tiny_batches("llama")),
    "drop_hidden_": lambda model, _: hf_sparse.drop_hidden_(model, 1, tiny_batches("llama")),
    "plan_slim": lambda model, _: hf_sparse.plan_slim(model, tiny_batches("llama"), params=0.7),
    "slim_": lambda model, _: hf_sparse.slim_(model, tiny_batches("llama"), params=0.7),
    "shrink_": lambda model, _: hf_sparse.shrink_(model),
    "benchmark": lambda model, _: hf_sparse.benchmark(model),
    "export_onnx": lambda model, folder: hf_sparse.export_onnx(model, folder),
    "compile": lambda model, _: hf_sparse.compile(model),
    "freeze_zeros_": lambda model, _: hf_sparse.freeze_zeros_(
        hf_sparse.SparseAdamW(hf_sparse.sparse_param_groups(model, CONFIG))
    ),
}


@pytest.mark.parametrize("part", ["", "model.layers.1"])
@pytest.mark.parametrize("call", CALLS)
def test_what_has_no_values_is_refused(call: str, part: str, tmp_path: Path) -> None:
    skip_unless_exports(call)
    model = sparse_model()
    model.get_submodule(part).to("meta")
    message = r"weight (is on the meta device|has no values)"
    with pytest.raises(ValueError, match=message):
        CALLS[call](model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_models_that_accelerate_offloads_are_measured() -> None:
    model, text = sparse_model(), prose()[:2000]
    wanted = hf_sparse.perplexity(model, tiny_tokenizer(), text, 16)
    offloaded = cpu_offload(model, torch.device("cpu"))
    found = hf_sparse.perplexity(offloaded, tiny_tokenizer(), text, 16)
    assert found == pytest.approx(wanted, rel=1e-4)
    classifier = cpu_offload(tiny_classifier(), torch.device("cpu"))
    hf_sparse.accuracy(classifier, tiny_tokenizer(), ["a word"], [0])
    with pytest.raises(ValueError, match=r"measure_sparsity: \S+weight is on the meta device"):
        hf_sparse.measure_sparsity(offloaded)
