"""Every training is told: by a teacher alone, with its learning rate, with numbers as numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import Distillation, SparsityConfig
from hf_sparse.checkpoint.source import stored_in
from hf_sparse.provenance.entry import ENTRY, from_dict
from hf_sparse.provenance.record import provenance_of
from hf_sparse.provenance.values import Step
from tests.provenance.test_provenance_of_producers import (
    CONFIG,
    card_of,
    loop,
    rows,
    steps_of,
    train,
    trained_by_callback,
)
from tests.support.tiny_models import tiny_batches, tiny_classifier, tiny_model


@pytest.mark.few(1)
@pytest.mark.parametrize("removed", [False, True])
def test_a_teacher_in_a_plain_trainer_is_told(tmp_path: Path, removed: bool) -> None:
    model = tiny_classifier()
    teaching = Distillation(tiny_classifier(), logits=0.7).attach(model)
    train(tmp_path, model)
    if removed:
        teaching.remove()
    facts = rows(card_of(model, tmp_path / "saved"))
    assert facts["method"] == "distillation"
    assert facts["teacher"].startswith("hidden 0.0, logits 0.7, model BertForSequence")
    assert (facts["option optimizer"], facts["option lr"]) == ("AdamW", "0.001")
    # Once: neither the next save nor the removal tells it again.
    hf_sparse.save_pretrained(model, tmp_path / "saved")
    teaching.remove()
    assert [step.method for step in steps_of(model)] == ["distillation"]
    # A second training by the same teacher is another step.
    again = Distillation(tiny_classifier(), logits=0.7).attach(model)
    loop(model, torch.optim.SGD(model.parameters(), lr=0.5), steps=1)
    again.remove()
    assert [dict(step.options)["lr"] for step in steps_of(model)] == [0.001, 0.5]


def test_a_teacher_that_taught_nothing_is_not_told(tmp_path: Path) -> None:
    model = tiny_classifier()
    teaching = Distillation(tiny_classifier()).attach(model)
    model(input_ids=torch.ones(1, 4, dtype=torch.long))  # in eval mode
    assert "Nothing that was recorded." in card_of(model, tmp_path)
    teaching.remove()
    assert steps_of(model) == ()


def test_a_teacher_that_is_told_with_the_training_is_told_once(tmp_path: Path) -> None:
    model = tiny_classifier()
    hf_sparse.prune_(model, CONFIG, "magnitude")
    teaching = Distillation(tiny_classifier()).attach(model)
    train(tmp_path, model, callbacks=[hf_sparse.KeepZeros()])
    hf_sparse.save_pretrained(model, tmp_path / "saved")
    teaching.remove()
    methods = [step.method for step in steps_of(model)]
    assert methods == ["magnitude", "fine-tuning with frozen zeros"]
    assert steps_of(model)[1].distillation


@pytest.mark.parametrize("removed", [False, True])
def test_adapters_tell_of_their_teacher_and_rate_when_they_are_merged(removed: bool) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    hf_sparse.prune_(model, CONFIG, "magnitude")
    adapted = hf_sparse.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4))
    teaching = Distillation(tiny_model("llama", seed=1)).attach(adapted)
    optimizer = torch.optim.AdamW(p for p in adapted.parameters() if p.requires_grad)
    optimizer.param_groups[0]["lr"] = 0.02
    adapted.train()
    for batch in tiny_batches("llama"):
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    if removed:
        teaching.remove()
    assert [step.method for step in steps_of(model)] == ["magnitude"]
    merged = hf_sparse.merge_adapters_(adapted)
    teaching.remove()
    [_, step] = steps_of(merged)
    assert step.method == "merged adapter"
    assert dict(step.options) == {
        "kind": "masked_lora" if "masked" in str(dict(step.options)["kind"]) else "lora",
        "r": 2, "lora_alpha": 4, "optimizer": "AdamW", "lr": 0.02,
    }  # fmt: skip
    assert dict(step.distillation)["logits"] == 0.5


def test_a_teacher_of_dropped_adapters_is_not_told_of_later_training() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    hf_sparse.prune_(model, CONFIG, "magnitude")
    adapted = hf_sparse.get_peft_model(model, peft.LoraConfig(r=2))
    teaching = Distillation(tiny_model("llama", seed=1)).attach(adapted)
    adapted.train()
    [batch, *_] = tiny_batches("llama")
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    teaching.remove()
    plain = adapted.unload()
    hf_sparse.recover_(plain, tiny_batches("llama"))
    assert [bool(step.distillation) for step in steps_of(plain)] == [False, False]


def test_two_optimizers_of_two_models_are_told_apart() -> None:
    models = [tiny_classifier(), tiny_classifier()]
    teachings = [Distillation(tiny_classifier()).attach(model) for model in models]
    for rate, model in zip((0.1, 0.2), models, strict=True):
        loop(model, torch.optim.SGD(model.parameters(), lr=rate), steps=1)
    for teaching in teachings:
        teaching.remove()
    assert [dict(steps_of(model)[0].options)["lr"] for model in models] == [0.1, 0.2]


def test_recovery_tells_of_its_teacher_in_one_place(tmp_path: Path) -> None:
    model, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    teacher.save_pretrained(tmp_path / "the dense one")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "the dense one")
    hf_sparse.prune_(model, CONFIG, "magnitude")
    report = hf_sparse.recover_(model, tiny_batches("llama"), teacher=teacher)
    text = hf_sparse.save_pretrained(model, tmp_path / "a", report=report) / "README.md"
    assert "distilled" not in text.read_text()
    assert "model LlamaForCausalLM from the folder the dense one" in text.read_text()
    assert str(tmp_path) not in text.read_text()
    assert [step.method for step in steps_of(model)] == ["magnitude", "recovery by finetune"]


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["proximal", "magnitude"])
def test_the_learning_rate_of_sparse_training_is_told(tmp_path: Path, method: str) -> None:
    model, _ = trained_by_callback(tmp_path, method, lr=2e-3)
    assert (
        rows(card_of(model, tmp_path / "saved"))["option lr"] == "0.002"
    )  # not the scheduler's last


def test_options_are_stored_as_what_they_are(tmp_path: Path) -> None:
    model = tiny_model("llama")
    options = {"scope": "layer", "a": 1, "b": 0.5, "c": True, "d": None, "e": (1, 2)}
    step = Step.of("own", {**options, "f": float("inf"), "g": 2**70})
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    from hf_sparse.provenance.record import record_

    record_(model, step)
    hf_sparse.save_pretrained(model, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored[ENTRY]["steps"][1]["options"] == {
        **options, "e": "(1, 2)", "f": "inf", "g": str(2**70),
    }  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert provenance_of(loaded).steps[1] == step
    text = (tmp_path / "README.md").read_text()
    assert "| option c | yes |\n| option d | none |" in text


def test_older_files_with_texts_still_load_and_are_known_again(tmp_path: Path) -> None:
    entry = {"version": 1, "steps": [{"method": "wanda", "options": {"damping": "0.01"}}]}
    [step] = from_dict(entry).steps
    assert step.options == (("damping", "0.01"),)
    assert step.is_told_by(Step.of("wanda", {"damping": 0.01, "more": True}))
    assert not step.is_told_by(Step.of("wanda", {"damping": 0.02}))
    for bad in (float("nan"), 10**400, ["a"], {"a": 1}):
        with pytest.raises(hf_sparse.FormatError):
            from_dict({"version": 1, "steps": [{"method": "wanda", "options": {"a": bad}}]})


@pytest.mark.parametrize("older", [False, True])
def test_a_base_model_that_is_not_known_is_absent(tmp_path: Path, older: bool) -> None:
    model = tiny_model("llama")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    folder = hf_sparse.save_pretrained(model, tmp_path / "a")
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert "base_model" not in values
    if older:
        (folder / "config.json").write_text(json.dumps({**values, "base_model": ""}))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.config.name_or_path = "someone/sparse"  # where a sparse model is from is no dense model
    hf_sparse.save_pretrained(loaded, tmp_path / "b")
    assert "base_model" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert stored_in(tmp_path / "b").base_model is None


def test_another_optimizer_is_refused_with_what_is_wanted(tmp_path: Path) -> None:
    message = r"this AdamW has no param group that is to be sparse.*trainer_optimizer\(config"
    with pytest.raises(ValueError, match=message) as refused:
        train(tmp_path, tiny_classifier(), callbacks=[hf_sparse.SparsityCallback(CONFIG)])
    assert "[]" not in str(refused.value)
