"""Values of wrong kinds are refused by every public call, before it works, with what was wanted."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_sparse
from hf_sparse import Metric, SparsityConfig
from hf_sparse.arguments import _KINDS
from tests.support.exporting import skip_unless_exports
from tests.support.tiny_models import (
    prose,
    tiny_batches,
    tiny_classifier,
    tiny_model,
    tiny_tokenizer,
)

CONFIG = SparsityConfig("2:4")
NAN = float("nan")
# What no parameter of a kind takes, nor None.
WRONG: dict[str, list[Any]] = {
    "bool": ["yes", 1, 0.5],
    "int": ["3", True, 0.5, NAN, [3]],
    "float": ["0.1", True, NAN, [0.1]],
    "str": [3, True, ["x"], b"x"],
    "Sequence[str]": ["x", 3, [3], {"x": 1}],
    "Sequence[float]": ["x", 3.0, ["x"], [True]],
    "Sequence[Metric]": [Metric("x", 1.0), {"x": 1.0}, ["x"], 3],
    "Mapping[str, Any]": ["x", [("license", "mit")], 3],
    "SparsityReport": [{}, "x", 3],
}


def optimizer() -> torch.optim.Optimizer:
    model = tiny_model("llama")
    return hf_sparse.SparseAdamW(hf_sparse.sparse_param_groups(model, CONFIG), lr=1e-3)


# What each call is given beside the wrong value; the folder never comes to be.
CALLS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "Distillation": lambda _: {"teacher": tiny_model("llama")},
    "Metric": lambda _: {"name": "perplexity", "sparse": 1.0},
    "Schedule": lambda _: {},
    "SparseAdamW": lambda _: {"params": [nn.Parameter(torch.ones(4, 4))]},
    "SparseSGD": lambda _: {"params": [nn.Parameter(torch.ones(4, 4))]},
    "Sparsifier": lambda _: {"optimizer": optimizer(), "config": CONFIG, "total_steps": 10},
    "SparsityCallback": lambda _: {"config": CONFIG},
    "accuracy": lambda _: {
        "model": tiny_classifier(),
        "tokenizer": tiny_tokenizer(),
        "texts": ["a"],
        "labels": [0],
    },
    "allocate": lambda _: {"model": tiny_model("llama"), "budget": 0.5},
    "benchmark": lambda _: {"model": tiny_model("llama")},
    "bit_budget": lambda _: {
        "model": tiny_model("llama"),
        "budget": 0.5,
        "batches": tiny_batches("llama"),
    },
    "calibration_batches": lambda _: {"tokenizer": tiny_tokenizer(), "documents": prose()},
    "compile": lambda _: {"model": tiny_model("llama")},
    "convert_legacy": lambda folder: {"folder": folder, "output": folder / "out"},
    "drop_blocks_": lambda _: {
        "model": tiny_model("llama"),
        "count": 1,
        "batches": tiny_batches("llama"),
    },
    "drop_experts_": lambda _: {
        "model": tiny_model("llama"),
        "count": 1,
        "batches": tiny_batches("llama"),
    },
    "drop_hidden_": lambda _: {
        "model": tiny_model("llama"),
        "count": 1,
        "batches": tiny_batches("llama"),
    },
    "export_gguf": lambda folder: {"model": tiny_model("llama"), "file": folder / "model.gguf"},
    "export_onnx": lambda folder: {"model": tiny_model("llama"), "folder": folder},
    "get_peft_model": lambda _: {"model": tiny_model("llama"), "config": None},
    "inspect_checkpoint": lambda folder: {"folder": folder},
    "labelled_batches": lambda _: {
        "model": tiny_classifier(),
        "tokenizer": tiny_tokenizer(),
        "texts": ["a"],
        "labels": [0],
    },
    "load_adapter": lambda folder: {"model": tiny_model("llama"), "folder": folder},
    "load_compiled": lambda folder: {"folder": folder},
    "merge_adapters_": lambda _: {"model": tiny_model("llama")},
    "perplexity": lambda _: {
        "model": tiny_model("llama"),
        "tokenizer": tiny_tokenizer(),
        "text": prose()[:2000],
    },
    "plan_slim": lambda _: {"model": tiny_model("llama"), "batches": tiny_batches("llama")},
    "evaluate_choices": lambda _: {
        "model": tiny_model("llama"),
        "tokenizer": tiny_tokenizer(),
        "tasks": {"pairs": [{"good": "a b", "bad": "b a"}]},
    },
    "prune_": lambda _: {"model": tiny_model("llama"), "config": CONFIG},
    "prune_checkpoint": lambda folder: {
        "source": folder / "dense",
        "folder": folder,
        "config": CONFIG,
    },
    "push_to_hub": lambda _: {"model": tiny_model("llama"), "repo_id": "user/name"},
    "quantize_": lambda _: {"model": tiny_model("llama"), "bits": 8},
    "recover_": lambda _: {"model": tiny_model("llama"), "batches": tiny_batches("llama")},
    "report": lambda folder: {"models": tiny_model("llama"), "html": folder / "page.html"},
    "save_compiled": lambda folder: {"model": tiny_model("llama"), "folder": folder},
    "save_pretrained": lambda folder: {"model": tiny_model("llama"), "folder": folder},
    "shrink_": lambda _: {"model": tiny_model("llama")},
    "slim_": lambda _: {"model": tiny_model("llama"), "batches": tiny_batches("llama")},
    "sparse_param_groups": lambda _: {"model": tiny_model("llama"), "config": CONFIG},
    "sparsify_": lambda folder: {
        "model": tiny_model("llama"),
        "config": CONFIG,
        "batches": tiny_batches("llama"),
        "folder": folder,
    },
    "sparsity_for": lambda _: {"budget": 0.5, "pattern": "unstructured"},
    "trainer_optimizer": lambda _: {"config": CONFIG, "lr": 1e-3},
}
# Calls without a parameter of a kind that is checked, and values that calls return.
WITHOUT = {
    *(
        "BitBudget",
        "ChoiceReport",
        "DropReport",
        "ExpertReport",
        "FormatError",
        "HiddenReport",
        "KeepZeros",
        "OffGridError",
        "Pattern",
        "QuantizationReport",
    ),
    *("SlimPlan", "SlimReport", "SparsifyPlan", "plan_sparsify"),
    *("ShrinkReport", "SparsityConfig", "SparsityReport"),
    *("add_shrinkage_", "freeze_zeros_", "keep_zeros_", "measure_sparsity"),
}
# The arguments of `save_pretrained` and `push_to_hub` that their signatures hold in `**kwargs`.
SAVING = {
    "is_main_process": "bool",
    "max_shard_size": "int | str",
    "variant": "str | None",
    "state_dict": "Mapping[str, Any] | None",
}


def checked(call: str) -> dict[str, list[str]]:
    """The parameters of a call whose kinds are known, with the parts of their annotations."""
    parameters = inspect.signature(getattr(hf_sparse, call)).parameters.values()
    annotations = {parameter.name: str(parameter.annotation) for parameter in parameters}
    annotations |= SAVING if call == "save_pretrained" else {}
    known = {name: text.split(" | ") for name, text in annotations.items()}
    return {name: kinds for name, kinds in known.items() if all(kind in _KINDS for kind in kinds)}


@pytest.mark.few(10)
@pytest.mark.parametrize("call", CALLS)
def test_values_of_a_wrong_kind_are_refused(call: str, tmp_path: Path) -> None:
    skip_unless_exports(call)
    given, function = CALLS[call](tmp_path / "new"), getattr(hf_sparse, call)
    for name, kinds in checked(call).items():
        for kind in kinds:
            for value in WRONG.get(kind, []):
                if any(_KINDS[other][0](value) for other in kinds):
                    continue
                with pytest.raises(ValueError, match=r"wanted|[Kk]nown") as error:
                    function(**{**given, name: value})
                told = {"source": "folder", "shape": "schedule"}.get(name, name.split("_")[0])
                assert told in str(error.value), (name, value, str(error.value))
    assert not (tmp_path / "new").exists()


def test_every_public_call_is_tried() -> None:
    assert set(hf_sparse._PUBLIC) == {*CALLS, *WITHOUT}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"report": {}}, r"report is \{\}; wanted a SparsityReport, as prune_ returns it, or None"),
        ({"metrics": Metric("x", 1.0)}, r"metrics is Metric.*wanted a list of hf_sparse\.Metric"),
        ({"metrics": {"x": 1.0}}, "wanted a list of hf_sparse.Metric"),
        ({"tokenizer": "x"}, "tokenizer is 'x'; wanted a tokenizer.*AutoTokenizer"),
        ({"tokenizer": tiny_model("llama")}, "wanted a tokenizer"),
        ({"tags": "tiny"}, r"Did you mean \['tiny'\]\?"),
        ({"max_shard_size": "much"}, "max_shard_size is 'much'; wanted a size such as '5GB'"),
        ({"max_shard_size": -1}, "max_shard_size is -1"),
    ],
    ids=str,
)
def test_saving_tells_what_it_wants(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        hf_sparse.save_pretrained(tiny_model("llama"), tmp_path / "new", **values)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("call", ["push_to_hub", "export_onnx", "prune_checkpoint"])
def test_a_name_is_no_tokenizer(call: str, tmp_path: Path) -> None:
    skip_unless_exports(call)
    with pytest.raises(ValueError, match="tokenizer is 'gpt2'; wanted a tokenizer"):
        getattr(hf_sparse, call)(**CALLS[call](tmp_path / "new"), tokenizer="gpt2")


def test_a_number_in_a_text_is_recognised() -> None:
    with pytest.raises(ValueError, match=r"recover_: lr is '1e-3'.*Did you mean 0\.001\?"):
        hf_sparse.recover_(tiny_model("llama"), tiny_batches("llama"), lr="1e-3")  # type: ignore[arg-type]


def test_what_is_no_accelerator_and_no_class_of_an_optimizer_is_refused() -> None:
    for value in ("cpu", torch.device("cpu"), tiny_model("llama")):
        with pytest.raises(ValueError, match="wanted an accelerate"):
            hf_sparse.prune_(tiny_model("llama"), CONFIG, "magnitude", accelerator=value)
    with pytest.raises(ValueError, match="optimizer_cls is 'AdamW'; wanted a class"):
        hf_sparse.trainer_optimizer(CONFIG, lr=1e-3, optimizer_cls="AdamW")  # type: ignore[arg-type]
