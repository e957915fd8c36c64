"""Every call that changes a model adds its step, which the card of the saved model tells."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_sparse
from hf_sparse import SparseAdamW, Sparsifier, SparsityConfig, sparse_param_groups
from hf_sparse.provenance.record import provenance_of
from hf_sparse.provenance.values import Calibration, Step
from tests.checkpoint.test_legacy import sparse_llama, write_legacy
from tests.support.sparse_models import pruned_and_loaded
from tests.support.tiny_models import tiny_batches, tiny_classifier, tiny_model

CONFIG = SparsityConfig("unstructured", 0.6)


def steps_of(model: nn.Module) -> tuple[Step, ...]:
    return provenance_of(model).steps


def card_of(model: Any, folder: Path) -> str:
    """The card as it is written without a word about the steps."""
    return (hf_sparse.save_pretrained(model, folder) / "README.md").read_text()


def rows(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.*?) \| (.*) \|$", card, flags=re.MULTILINE))


def batch() -> dict[str, Tensor]:
    ids = torch.arange(2, 42).reshape(4, 10)
    return {"input_ids": ids, "labels": ids[:, 0] % 3}


def train(folder: Path, model: Any, **arguments: Any) -> None:
    """Twenty steps of Trainer."""
    one = {name: value[0] for name, value in batch().items()}
    settings = TrainingArguments(
        str(folder), max_steps=12, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, seed=3, learning_rate=1e-3, per_device_train_batch_size=2,
    )  # fmt: skip
    Trainer(model, settings, train_dataset=[one] * 8, **arguments).train()


def loop(model: nn.Module, optimizer: Any, sparsifier: Any = None, steps: int = 12) -> None:
    model.train()
    for _ in range(steps):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if sparsifier is not None:
            sparsifier.step()


def trained_by_callback(
    folder: Path, method: str, lr: float = 1e-3
) -> tuple[Any, hf_sparse.SparsityCallback]:
    """A classifier that Trainer made sparse, and the callback that told it how."""
    model = tiny_classifier()
    factory = hf_sparse.trainer_optimizer(CONFIG, lr=lr)
    callback = hf_sparse.SparsityCallback(CONFIG, method=method)
    train(folder, model, optimizer_cls_and_kwargs=factory, callbacks=[callback])
    return model, callback


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["proximal", "magnitude"])
def test_training_with_the_callback_is_told_without_a_report(tmp_path: Path, method: str) -> None:
    model, callback = trained_by_callback(tmp_path, method)
    facts = rows(card_of(model, tmp_path / "saved"))
    assert facts["method"] == ("SparseAdamW" if method == "proximal" else "magnitude")
    assert facts.get("option penalty") == ("l0" if method == "proximal" else None)
    assert facts["option schedule"].startswith("cubic ")
    assert (facts["option steps"], facts["seed"], facts["sparsity"]) == ("12", "3", "0.6")
    assert len(steps_of(model)) == 1
    # The report tells of the same step.
    hf_sparse.save_pretrained(model, tmp_path / "saved", report=callback.report)
    assert len(steps_of(model)) == 1


@pytest.mark.parametrize("finished", [True, False])
def test_a_loop_with_a_sparsifier_is_told(tmp_path: Path, finished: bool) -> None:
    model = tiny_classifier()
    optimizer = SparseAdamW(sparse_param_groups(model, CONFIG), lr=1e-3)
    sparsifier = Sparsifier(optimizer, CONFIG, total_steps=12)
    loop(model, optimizer, sparsifier, 12 if finished else 7)
    [step] = steps_of(model)
    assert (step.method, dict(step.options)["steps"]) == ("SparseAdamW", 12 if finished else 7)
    sparsifier.report(model)
    assert len(steps_of(model)) == 1
    assert rows(card_of(model, tmp_path))["option penalty"] == dict(step.options)["penalty"]


def test_pruning_in_the_midst_of_training_makes_two_steps_of_it() -> None:
    model = tiny_classifier()
    hf_sparse.prune_(model, SparsityConfig("unstructured", 0.3), "magnitude")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for sparsity in (0.5, 0.6):
        hf_sparse.keep_zeros_(optimizer, model)
        loop(model, optimizer, steps=2)
        hf_sparse.prune_(model, SparsityConfig("unstructured", sparsity), "magnitude")
    tuned = "fine-tuning with frozen zeros"
    methods = [step.method for step in steps_of(model)]
    assert methods == ["magnitude", tuned, "magnitude", tuned, "magnitude"]


def test_an_optimizer_that_shrinks_nothing_is_not_told() -> None:
    model = tiny_classifier()
    factory, settings = hf_sparse.trainer_optimizer(CONFIG, lr=1e-3, lam=0.0)
    loop(model, factory()(model, **settings), steps=1)
    assert steps_of(model) == ()


def test_models_in_training_are_told_apart() -> None:
    first, second = tiny_classifier(), tiny_classifier()
    optimizers = [SparseAdamW(sparse_param_groups(m, CONFIG), lr=1e-3) for m in (first, second)]
    loop(second, optimizers[1], Sparsifier(optimizers[1], CONFIG, total_steps=12), 2)
    assert (len(steps_of(first)), len(steps_of(second))) == (0, 1)


def test_an_optimizer_alone_is_told(tmp_path: Path) -> None:
    model = tiny_classifier()
    factory = hf_sparse.trainer_optimizer(CONFIG, lr=1e-3, lam=0.01, penalty="l1")
    train(tmp_path, model, optimizer_cls_and_kwargs=factory)
    [step] = steps_of(model)
    assert (step.method, step.pattern) == ("SparseAdamW", "unstructured")
    assert {("lam", 0.01), ("penalty", "l1"), ("lr", 1e-3)} <= set(step.options)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "way", ["KeepZeros", "keep_zeros_", "trainer_optimizer", "freeze_zeros_", "DDP"]
)
def test_fine_tuning_with_frozen_zeros_is_told(tmp_path: Path, way: str) -> None:
    model = tiny_classifier()
    hf_sparse.prune_(model, CONFIG, "magnitude")
    if way == "KeepZeros":
        train(tmp_path, model, callbacks=[hf_sparse.KeepZeros()])
    elif way == "trainer_optimizer":
        factory = hf_sparse.trainer_optimizer(CONFIG, lr=1e-3, keep_zeros=True)
        train(tmp_path, model, optimizer_cls_and_kwargs=factory)
    elif way == "freeze_zeros_":
        optimizer = SparseAdamW(sparse_param_groups(model, CONFIG), lr=1e-3)
        hf_sparse.freeze_zeros_(optimizer)
        loop(model, optimizer)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        wrapped: Any = model
        if way == "DDP":  # a wrapper that needs no processes to be looked into
            wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
            nn.Module.__init__(wrapped)
            wrapped.module = model
        hf_sparse.keep_zeros_(optimizer, wrapped)
        assert len(steps_of(model)) == 1  # nothing has been trained yet
        loop(model, optimizer)
    first, second = steps_of(model)
    assert (first.method, second.method) == ("magnitude", "fine-tuning with frozen zeros")
    assert dict(second.options)["lr"] == 0.001
    assert ("steps", 12) in second.options or way != "KeepZeros"
    assert "### Step 2" in card_of(model, tmp_path / "saved")


@pytest.mark.few(1)
@pytest.mark.parametrize("way", ["callback", "sparsifier", "KeepZeros", "recover_"])
def test_a_teacher_is_told_with_the_training(tmp_path: Path, way: str) -> None:
    if way == "recover_":
        model, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
        hf_sparse.prune_(model, CONFIG, "magnitude")
        hf_sparse.recover_(model, tiny_batches("llama"), teacher=teacher)
        hf_sparse.recover_(model, tiny_batches("llama"))
    else:
        model, teacher = tiny_classifier(), tiny_classifier()
        hf_sparse.prune_(model, CONFIG, "magnitude")
        teaching = hf_sparse.Distillation(teacher, hidden=1.0).attach(model)
        if way == "callback":
            factory = hf_sparse.trainer_optimizer(CONFIG, lr=1e-3)
            callback = hf_sparse.SparsityCallback(CONFIG)
            train(tmp_path, model, optimizer_cls_and_kwargs=factory, callbacks=[callback])
            teaching.remove()
        elif way == "KeepZeros":
            train(tmp_path, model, callbacks=[hf_sparse.KeepZeros()])
            teaching.remove()
        else:
            optimizer = SparseAdamW(sparse_param_groups(model, CONFIG), lr=1e-3)
            sparsifier = Sparsifier(optimizer, CONFIG, total_steps=12)
            loop(model, optimizer, sparsifier)
            teaching.remove()
            sparsifier.report(model)
        # Without the teacher another training tells of none.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        hf_sparse.keep_zeros_(optimizer, model)
        loop(model, optimizer, steps=1)
    taught = [dict(step.distillation) for step in steps_of(model)]
    assert [bool(each) for each in taught] == [False, True, False]
    assert (taught[1]["logits"], taught[1]["temperature"]) == (0.5, 2.0)
    assert "| teacher | hidden " in card_of(model, tmp_path / "saved")


def test_of_two_prunings_both_are_told_in_full(tmp_path: Path) -> None:
    first = SparsityConfig("unstructured", 0.7)
    model = pruned_and_loaded(tmp_path / "first", first, "sparsegpt")
    batches = tiny_batches("llama")
    hf_sparse.prune_(model, SparsityConfig("2:4", targets="mlp.*"), "wanda", batches)
    card = card_of(model, tmp_path / "second")
    first, second = (rows(part) for part in re.split(r"### Step \d", card)[1:])
    assert (first["method"], first["pattern"], first["sparsity"]) == (
        "sparsegpt", "unstructured", "0.7",
    )  # fmt: skip
    assert (second["method"], second["pattern"], second["targets"]) == ("wanda", "2:4", "mlp.*")
    windows = sum(len(batch["input_ids"]) for batch in batches)
    for step in (first, second):
        assert step["calibration"].startswith(f"{windows} windows of 12 tokens, ")
        assert step["made with"].startswith(f"hf_sparse {hf_sparse.__version__}, torch ")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", step["date"])


def test_calibration_is_described() -> None:
    ids = torch.ones(2, 6, dtype=torch.long)
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    described = Calibration.of([{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1]}])
    assert described == Calibration(windows=3, length=6, tokens=14)
    assert Calibration.of([{"pixel_values": torch.ones(5, 3, 2, 2)}]) == Calibration(windows=5)


def test_a_streamed_pruning_tells_the_same_step(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    batches = tiny_batches("llama")
    config = SparsityConfig("2:4")
    hf_sparse.prune_checkpoint(tmp_path / "dense", tmp_path / "a", config, batches=batches)
    hf_sparse.prune_(model, config, batches=batches)
    assert steps_of(AutoModelForCausalLM.from_pretrained(tmp_path / "a")) == steps_of(model)


def test_merged_adapters_are_told(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    hf_sparse.prune_(model, CONFIG, "magnitude")
    adapted = hf_sparse.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4))
    card = card_of(adapted, tmp_path / "copy")
    assert "| method | merged adapter |" in card
    assert "| option kind | lora |" in card
    assert [step.method for step in steps_of(adapted)] == ["magnitude"]  # its copy was merged
    merged = hf_sparse.merge_adapters_(adapted)
    assert [step.method for step in steps_of(merged)] == ["magnitude", "merged adapter"]
    assert dict(steps_of(merged)[1].options)["r"] == 2


def test_recovery_by_adapters_is_one_step() -> None:
    pytest.importorskip("peft")
    model = tiny_model("llama")
    hf_sparse.prune_(model, CONFIG, "magnitude")
    hf_sparse.recover_(model, tiny_batches("llama"), "lora", seed=5)
    assert [step.method for step in steps_of(model)] == ["magnitude", "recovery by lora"]
    assert steps_of(model)[1].seed == 5


def test_a_conversion_is_told(tmp_path: Path) -> None:
    write_legacy(tmp_path / "old", sparse_llama())
    hf_sparse.convert_legacy(tmp_path / "old", tmp_path / "new")
    [step] = steps_of(AutoModelForCausalLM.from_pretrained(tmp_path / "new"))
    assert step.method == "conversion from compressed-tensors"
    assert step.options == (("format", "sparse-bitmask"),)
