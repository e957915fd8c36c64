"""Calls that are given a folder's name for a model, or a text or dict for a config, say so."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import hf_sparse
from hf_sparse import SparsityConfig
from tests.support.tiny_models import tiny_batches, tiny_model, tiny_tokenizer

CONFIG = SparsityConfig("2:4")
# Every call that takes a model; the folder never comes to be.
CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "prune_": lambda model, _: hf_sparse.prune_(model, CONFIG, "magnitude"),
    "quantize_": lambda model, _: hf_sparse.quantize_(model, bits=8),
    "measure_sparsity": lambda model, _: hf_sparse.measure_sparsity(model),
    "recover_": lambda model, _: hf_sparse.recover_(model, tiny_batches("llama")),
    "sparse_param_groups": lambda model, _: hf_sparse.sparse_param_groups(model, CONFIG),
    "keep_zeros_": lambda model, _: hf_sparse.keep_zeros_(
        torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0), model
    ),
    "get_peft_model": lambda model, _: hf_sparse.get_peft_model(model, peft.LoraConfig()),
    "load_adapter": lambda model, folder: hf_sparse.load_adapter(model, folder),
    "merge_adapters_": lambda model, _: hf_sparse.merge_adapters_(model),
    "Distillation": lambda model, _: hf_sparse.Distillation(model),
    "bit_budget": lambda model, _: hf_sparse.bit_budget(model, 0.5, tiny_batches("llama")),
    "allocate": lambda model, _: hf_sparse.allocate(model, 0.5),
    "perplexity": lambda model, _: hf_sparse.perplexity(model, tiny_tokenizer(), "text"),
    "accuracy": lambda model, _: hf_sparse.accuracy(model, tiny_tokenizer(), ["a"], [0]),
    "labelled_batches": lambda model, _: hf_sparse.labelled_batches(
        model, tiny_tokenizer(), ["a"], [0]
    ),
}
TRANSFORMERS_ONLY: dict[str, Callable[[Any, Path], Any]] = {
    "save_pretrained": lambda model, folder: hf_sparse.save_pretrained(model, folder, CONFIG),
    "push_to_hub": lambda model, _: hf_sparse.push_to_hub(model, "user/name"),
    "drop_blocks_": lambda model, _: hf_sparse.drop_blocks_(model, 1, tiny_batches("llama")),
    "drop_experts_": lambda model, _: hf_sparse.drop_experts_(model, 1, tiny_batches("llama")),
    "drop_hidden_": lambda model, _: hf_sparse.drop_hidden_(model, 1, tiny_batches("llama")),
    "plan_slim": lambda model, _: hf_sparse.plan_slim(model, tiny_batches("llama"), params=0.7),
    "plan_sparsify": lambda model, _: hf_sparse.plan_sparsify(
        model, CONFIG, tiny_batches("llama"), "seconds"
    ),
    "sparsify_": lambda model, _: hf_sparse.sparsify_(
        model, CONFIG, tiny_batches("llama"), "seconds"
    ),
    "evaluate_choices": lambda model, _: hf_sparse.evaluate_choices(
        model, tiny_tokenizer(), {"pairs": [{"good": "a b", "bad": "b a"}]}
    ),
    "slim_": lambda model, _: hf_sparse.slim_(model, tiny_batches("llama"), params=0.7),
    "shrink_": lambda model, _: hf_sparse.shrink_(model),
    "benchmark": lambda model, _: hf_sparse.benchmark(model),
    "export_gguf": lambda model, folder: hf_sparse.export_gguf(model, folder / "model.gguf"),
    "export_onnx": lambda model, folder: hf_sparse.export_onnx(model, folder),
    "save_compiled": lambda model, folder: hf_sparse.save_compiled(model, folder),
    "compile": lambda model, _: hf_sparse.compile(model),
}


class Pipeline:
    """Something that holds a model, as transformers' pipelines do."""

    def __init__(self) -> None:
        self.model = nn.Linear(2, 2)


@pytest.mark.few(111)
@pytest.mark.parametrize(
    ("model", "way_out"),
    [
        ("my/folder", r"AutoModelForCausalLM.from_pretrained\('my/folder'\)"),
        (Path("folder"), r"AutoModelForCausalLM.from_pretrained\('folder'\)"),
        (LlamaForCausalLM, r"LlamaForCausalLM.from_pretrained\(\.\.\.\)"),
        (Pipeline(), r"\.model"),
        (None, "NoneType"),
        ({}, "dict"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("call", {**CALLS, **TRANSFORMERS_ONLY})
def test_what_is_no_model_is_refused(call: str, model: Any, way_out: str, tmp_path: Path) -> None:
    run = {**CALLS, **TRANSFORMERS_ONLY}[call]
    message = rf"{call} takes a .*model, not .*{'' if call == 'compile' else way_out}"
    with pytest.raises(ValueError, match=message):
        run(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("call", TRANSFORMERS_ONLY)
def test_plain_modules_are_refused_where_transformers_is_needed(call: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{call} takes a transformers model, not a Linear"):
        TRANSFORMERS_ONLY[call](nn.Linear(4, 4), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_every_public_call_with_a_model_is_tried() -> None:
    public = {name: getattr(hf_sparse, name) for name in hf_sparse._PUBLIC}
    with_model = {
        name
        for name, value in public.items()
        if (inspect.isfunction(value) or value is hf_sparse.Distillation)
        and {"model", "teacher"} & set(list(inspect.signature(value).parameters)[:2])
    }
    assert with_model == {*CALLS, *TRANSFORMERS_ONLY}


@pytest.mark.parametrize(
    ("config", "way_out"),
    [
        ("2:4", r"SparsityConfig\('2:4'\)"),
        ({"pattern": "2:4"}, r"SparsityConfig.from_dict\(config\)"),
        (0.5, "a SparsityConfig"),
        (tiny_model("llama").config, "a SparsityConfig"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_config_is_refused(config: Any, way_out: str, tmp_path: Path) -> None:
    model, new = tiny_model("llama"), tmp_path / "new"
    optimizer = hf_sparse.SparseAdamW(hf_sparse.sparse_param_groups(model, CONFIG))
    calls: list[Callable[[], Any]] = [
        lambda: hf_sparse.prune_(model, config, "magnitude"),
        lambda: hf_sparse.measure_sparsity(model, config),
        lambda: hf_sparse.save_pretrained(model, new, config),
        lambda: hf_sparse.push_to_hub(model, "user/name", config),
        lambda: hf_sparse.prune_checkpoint(tmp_path, new, config),
        lambda: hf_sparse.sparse_param_groups(model, config),
        lambda: hf_sparse.trainer_optimizer(config, lr=1e-3),
        lambda: hf_sparse.SparsityCallback(config),
        lambda: hf_sparse.Sparsifier(optimizer, config, 10),
        lambda: hf_sparse.KeepZeros(config),
        lambda: hf_sparse.keep_zeros_(optimizer, model, config),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"config is .*; wanted .*{way_out}"):
            call()
    assert not new.exists()


def test_a_model_in_place_of_a_folder_is_told(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="folder is a SparsityConfig; wanted the name of a folder"):
        hf_sparse.save_pretrained(model, CONFIG, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="folder is a LlamaForCausalLM"):
        hf_sparse.export_onnx(model, model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="folder of the dense model is a LlamaForCausalLM"):
        hf_sparse.prune_checkpoint(model, tmp_path, CONFIG)  # type: ignore[arg-type]


def test_the_order_of_arguments_is_told() -> None:
    batches = tiny_batches("llama")
    with pytest.raises(ValueError, match=r"unknown method \[.*Known methods: magnitude, wanda"):
        hf_sparse.prune_(tiny_model("llama"), CONFIG, batches)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [hf_sparse.freeze_zeros_, hf_sparse.add_shrinkage_])
def test_a_model_in_the_place_of_its_optimizer_is_refused(call: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match="takes a torch optimizer, not a LlamaForCausalLM"):
        call(tiny_model("llama"))
    with pytest.raises(ValueError, match="Sparsifier takes a torch optimizer"):
        hf_sparse.Sparsifier(tiny_model("llama"), CONFIG, 10)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_recovery_without_gradients_is_refused(mode: Callable[[], Any]) -> None:
    model = tiny_model("llama")
    hf_sparse.prune_(model, CONFIG, "magnitude")
    with mode(), pytest.raises(ValueError, match=r"outside of torch\.no_grad"):
        hf_sparse.recover_(model, tiny_batches("llama"))
