"""What a notebook shows of an object: a line or two, however large the model is."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse import Schedule, SparsityConfig, SparsityReport
from hf_sparse.counts import TensorSparsity
from tests.support.tiny_models import tiny_classifier, tiny_model

CONFIGS = [
    SparsityConfig("2:4"),
    SparsityConfig("unstructured", 0.8),
    SparsityConfig("block:4x1", 0.75, "q_proj", ["lm_head", "a*"], "dense"),
    SparsityConfig("head:64", 0.5, targets=["q", "k"]),
    SparsityConfig(sparsity=0.1 + 0.2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_config_shows_the_call_that_makes_it(config: SparsityConfig) -> None:
    assert eval(repr(config), {"SparsityConfig": SparsityConfig}) == config
    assert eval(str(config), {"SparsityConfig": SparsityConfig}) == config


def test_defaults_are_not_shown() -> None:
    assert repr(SparsityConfig("2:4")) == "SparsityConfig('2:4')"
    assert repr(CONFIGS[1]) == "SparsityConfig('unstructured', sparsity=0.8)"


def large_report() -> SparsityReport:
    names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
    tensors = tuple(
        TensorSparsity(
            f"model.layers.{block}.{name}.weight", (4, 8), 8 + block % 2, int(block == 3)
        )
        for block in range(70)
        for name in names
    )
    return SparsityReport(tensors, "2:4", 10_000, "wanda", {"damping": 0.01}, 1.25)


def test_a_report_is_short() -> None:
    report = large_report()
    assert repr(report) == (
        "<SparsityReport: wanda, pattern 2:4, sparsity 0.2656 in 210 tensors, 0.1785 in the whole "
        "model; print it, or see .table()>"
    )
    lines = [line.split() for line in str(report).splitlines()]
    assert " ".join(lines[0]) == "tensors number zeros least sparsity most violations"
    assert lines[2:5] == [
        [f"model.layers.*.{name}.weight", "70", "595", "0.2500", "0.2812", "1"]
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    ]
    assert str(report).endswith(f"\n{report.summary()}")
    assert len(lines) == 5 + len(report.summary().splitlines())
    assert len(report.table().splitlines()) == 2 + 210 + len(report.summary().splitlines())


def test_a_report_of_many_kinds_is_bounded() -> None:
    tensors = tuple(TensorSparsity(f"layer_{i}.weight", (4, 8), i % 9, 0) for i in range(500))
    lines = str(SparsityReport(tensors, "unstructured", 16_000)).splitlines()
    assert len(lines) < 30
    assert "and 480 more" in lines[22]
    assert "measured" in repr(SparsityReport((), "unstructured", 0))


def test_to_dict_is_what_to_json_writes() -> None:
    report = large_report()
    values = report.to_dict()
    assert json.loads(json.dumps(values)) == json.loads(report.to_json())
    assert values["sparsity"] == report.sparsity
    assert values["options"] == {"damping": 0.01}
    assert len(values["tensors"]) == 210


def test_what_trains_and_keeps_is_short() -> None:
    config = SparsityConfig("unstructured", 0.5)
    model = tiny_classifier()
    optimizer = hf_sparse.SparseAdamW(hf_sparse.sparse_param_groups(model, config), lr=1e-3)
    sparsifier = hf_sparse.Sparsifier(optimizer, config, 10, schedule="linear")
    sparsifier.step()
    assert repr(sparsifier) == (
        "<Sparsifier of SparseAdamW: SparsityConfig('unstructured', sparsity=0.5), proximal, "
        "Schedule(shape='linear', begin=0.1, end=0.6), step 1 of 10>"
    )
    callback = hf_sparse.SparsityCallback(config, method="movement", gain=3.0)
    assert repr(callback) == (
        "SparsityCallback(SparsityConfig('unstructured', sparsity=0.5), schedule=Schedule("
        "shape='cubic', begin=0.1, end=0.6), method='movement', interval=10, gain=3.0)"
    )
    names: dict[str, Any] = {name: getattr(hf_sparse, name) for name in hf_sparse.__all__}
    assert repr(eval(repr(callback), names)) == repr(callback)
    assert eval(repr(Schedule("linear", 0.2)), names) == Schedule("linear", 0.2)
    assert repr(hf_sparse.KeepZeros()) == "KeepZeros()"
    assert repr(hf_sparse.KeepZeros(config)) == f"KeepZeros({config!r})"
    distillation = hf_sparse.Distillation(tiny_classifier(), hidden=1.0)
    assert repr(distillation) == (
        "<Distillation from BertForSequenceClassification: logits=0.5, hidden=1.0, temperature=2.0, "
        "not attached>"
    )
    distillation.attach(model)
    assert repr(distillation).endswith(" attached>")
    hf_sparse.prune_(model, config, "magnitude")
    mask = hf_sparse.keep_zeros_(torch.optim.SGD(model.parameters(), lr=1.0), model)
    assert repr(mask) == "<FrozenMask of SGD: zeros of 12 weights>"
    mask.remove()
    assert repr(mask).endswith("removed>")


def test_what_calls_return_is_short(tmp_path: Any) -> None:
    model = tiny_model("llama")
    config = SparsityConfig("column", 0.5)
    report = hf_sparse.prune_(model, config, "magnitude")
    found: list[Any] = [report, hf_sparse.shrink_(model)]
    hf_sparse.save_pretrained(model, tmp_path)
    found.append(hf_sparse.inspect_checkpoint(tmp_path))
    for value in found:
        assert repr(value).startswith(f"<{type(value).__name__}: ")
        assert len(repr(value)) < 250
        assert "\n" not in repr(value)
        assert len(str(value).splitlines()) < 15
