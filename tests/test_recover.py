"""Recovery in one call: what it trains, what it leaves, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparsityConfig, recover_
from hf_sparse.cli import main
from hf_sparse.recovery.methods import RECOVERIES
from tests.support.closeness import nearly_same
from tests.support.sparse_models import assert_same, places, sparse_model
from tests.support.tiny_models import prose, tiny_batches, tiny_model, tiny_tokenizer

OPTIONS: dict[str, dict[str, Any]] = {"shira": {"r": 4}, "lora": {"r": 4}, "finetune": {}}


def windows() -> list[Any]:
    return hf_sparse.calibration_batches(
        tiny_tokenizer(), [prose()[:30_000]], num_samples=16, window=32
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("method", RECOVERIES)
def test_the_loss_falls_and_the_zeros_stay(method: str, taught: bool) -> None:
    pytest.importorskip("peft")
    model = sparse_model()
    zeros, start = places(model), copy.deepcopy(model.state_dict())
    teacher = tiny_model("llama") if taught else None
    report = recover_(
        model,
        windows(),
        method,
        teacher=teacher,
        epochs=3,
        accumulate=2,
        lr=1e-2,
        **OPTIONS[method],
    )
    assert_same(places(model), zeros)
    assert (report.sparsity, report.violations) == (0.5, 0)
    assert report.method == f"recovery by {method}"
    first, last = (float(word) for word in report.notes[0].split() if word[0].isdigit())
    assert last < first - 0.02
    assert start.keys() == model.state_dict().keys()  # no adapter is left
    same = [name for name, value in model.state_dict().items() if torch.equal(value, start[name])]
    assert ("model.embed_tokens.weight" in same) == (method != "finetune")
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_hooks


@pytest.mark.slow
def test_it_is_repeatable() -> None:
    pytest.importorskip("peft")
    for method in RECOVERIES:
        models = [sparse_model() for _ in range(2)]
        for model in models:
            recover_(model, windows(), method, accumulate=4, **OPTIONS[method])
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            assert nearly_same(one, other)


def test_padding_is_not_learned() -> None:
    model = sparse_model()
    [batch] = tiny_batches("llama", 1, padded=True)
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 9)}
    twin = copy.deepcopy(model)
    recover_(model, [batch])
    recover_(twin, [other])
    inputs = tiny_batches("llama")[0]
    torch.testing.assert_close(model(**inputs).logits, twin(**inputs).logits)


def test_a_run_that_diverges_leaves_the_base_of_an_adapter() -> None:
    pytest.importorskip("peft")
    model = sparse_model()
    start = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the loss is (nan|inf)"):
        recover_(model, windows(), "lora", lr=1e30, accumulate=1)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "qlora"}, "unknown method 'qlora'. Known methods: finetune, lora, shira"),
        ({"epochs": 0}, "epochs is 0"),
        ({"r": 4}, "trains all weights; r is for"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"logits": 2.0, "teacher": tiny_model("llama")}, "logits is 2.0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recover_(sparse_model(), windows(), **arguments)


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="has no zeros to keep"):
        recover_(tiny_model("llama"), windows())
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 0
    with pytest.raises(ValueError, match="has no zeros to keep"):  # those by chance do not count
        recover_(model, windows())
    with pytest.raises(ValueError, match="loses small updates"):
        recover_(sparse_model().to(torch.bfloat16), windows())
    with pytest.raises(ValueError, match="needs calibration data"):
        recover_(sparse_model(), [])
    model = sparse_model()
    with pytest.raises(ValueError, match="its own teacher"):
        recover_(model, windows(), teacher=model)


def test_an_adapter_over_a_bfloat16_base() -> None:
    pytest.importorskip("peft")
    model = sparse_model().to(torch.bfloat16)
    zeros = places(model)
    recover_(model, windows(), "lora", accumulate=2, lr=1e-2)
    assert_same(places(model), zeros)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.few(1)
@pytest.mark.parametrize("method", RECOVERIES)
def test_the_command(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    dense, sparse, out = (str(tmp_path / name) for name in ("dense", "sparse", "out"))
    tiny_model("llama").save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    model = sparse_model()
    hf_sparse.save_pretrained(model, sparse, SparsityConfig("2:4"), tokenizer=tiny_tokenizer())
    text = tmp_path / "text.txt"
    text.write_text(prose()[:20_000])
    command = ["recover", sparse, out, "--data", str(text), "--method", method, "--window", "32"]
    command += ["--num-samples", "8", "--accumulate", "2", "--teacher", dense, "--json"]
    command += ["--held-out", "2", "--hidden", "0.5"]
    command += [] if method == "finetune" else ["--r", "2"]
    assert main(command) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["sparsity"], described["folder"]) == (0.5, out)
    assert described["options"]["distilled"] is True
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert_same(places(loaded), places(model))
    assert main(["recover", sparse, sparse, "--data", str(text)]) == 1
    assert main(["recover", sparse, out, "--data", str(text), "--lr", "search"]) == 1
    assert "--held-out 16" in capsys.readouterr().err
    again = ["recover", dense, out, "--data", str(text), "--window", "32"]
    assert main(again) == 1
    assert "is not empty: it holds config.json" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 1
    assert "has no zeros to keep" in capsys.readouterr().err
