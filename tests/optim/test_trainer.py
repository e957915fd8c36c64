"""Sparse training in Trainer and in a plain Accelerate loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_sparse
from hf_sparse import (
    Schedule,
    SparseSGD,
    SparsityCallback,
    SparsityConfig,
    save_pretrained,
    trainer_optimizer,
)
from tests.support.closeness import nearly_same
from tests.support.crosses import cross
from tests.support.tiny_models import tiny_classifier

CONFIG = SparsityConfig(sparsity=0.6, format="auto")


class Sentences(Dataset):
    """Random sequences; the class is the first token modulo 3."""

    def __init__(self, count: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(2, 200, (count, 10), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index, 0] % 3}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "warmup_steps": 2,
    }
    return TrainingArguments(**{**settings, **changes})


def trainer(
    folder: Path,
    config: SparsityConfig = CONFIG,
    *,
    method: str = "proximal",
    callbacks: tuple[TrainerCallback, ...] = (),
    optimizer: dict | None = None,
    model: Any = None,
    **changes: Any,
) -> Trainer:
    sparsity = SparsityCallback(
        config, method=method, schedule=Schedule("cubic", 0.1, 0.6), interval=2
    )
    return Trainer(
        model or tiny_classifier(),
        arguments(folder, **changes),
        train_dataset=Sentences(),
        eval_dataset=Sentences(16),
        compute_metrics=lambda _: {"step_score": 1.0},
        callbacks=[sparsity, *callbacks],
        optimizer_cls_and_kwargs=trainer_optimizer(config, **{"lr": 1e-3, **(optimizer or {})}),
    )


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("proximal", "unstructured"),
        ("proximal", "block:4x1"),
        ("proximal", "2:4"),
        ("magnitude", "unstructured"),
        ("movement", "block:4x1"),
        ("admm", "2:4"),
    ],
)
def test_trainer_gives_the_promised_zeros_and_a_compressed_checkpoint(
    method: str, pattern: str, tmp_path: Path
) -> None:
    config = SparsityConfig(pattern, None if pattern == "2:4" else 0.6)
    run = trainer(tmp_path, config, method=method, gradient_accumulation_steps=2)
    run.train()
    report = hf_sparse.measure_sparsity(run.model, config)
    assert report.violations == 0
    assert report.zeros == pytest.approx(config.sparsity * report.numel, abs=4)
    assert (run.model.classifier.weight != 0).all()
    assert (run.model.bert.embeddings.word_embeddings.weight[5] != 0).all()
    folder = save_pretrained(run.model, tmp_path / "sparse")
    described = json.loads((folder / "config.json").read_text())
    assert described["quantization_config"]["sparsity"] == config.sparsity
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    for name, value in run.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_only_targets_are_shrunk() -> None:
    config = SparsityConfig(sparsity=0.5, targets="layer.0.*")
    factory, kwargs = trainer_optimizer(config, lr=1e-3, lam=1e5, penalty="l1", weight_decay=0.0)
    model = tiny_classifier()
    optimizer = factory()(model, **kwargs)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer.step()
    for name, value in model.named_parameters():
        sparse = ".layer.0." in name and value.ndim == 2
        assert bool((value == 0).all()) if sparse else torch.equal(value, before[name]), name


@pytest.mark.slow
def test_other_optimizers_get_the_shrinkage(tmp_path: Path) -> None:
    for optimizer_cls in (torch.optim.NAdam, SparseSGD):
        run = trainer(tmp_path, optimizer={"optimizer_cls": optimizer_cls, "lr": 1e-2})
        run.train()
        assert hf_sparse.measure_sparsity(run.model, CONFIG).sparsity == pytest.approx(
            0.6, abs=1e-4
        )


class Reporter(TrainerCallback):
    """Stands for TensorBoard or W&B."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def test_sparsity_and_lam_are_logged(tmp_path: Path) -> None:
    run, reporter = trainer(tmp_path), Reporter()
    run.callback_handler.callbacks.insert(0, reporter)
    [sparsity] = [c for c in run.callback_handler.callbacks if isinstance(c, SparsityCallback)]
    sparsity.log_through(run)
    run.train()
    steps = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [5, 10, 15, 20]
    assert steps[-1]["sparsity"] == pytest.approx(0.6, abs=1e-4)
    assert 0 < steps[0]["sparsity"] < 0.6
    assert all("lam" in entry for entry in steps)
    assert [entry["sparsity"] for entry in reporter.seen if "loss" in entry] == [
        entry["sparsity"] for entry in steps
    ]


def weights_of(run: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


@pytest.mark.slow
@cross("method, stop", ["proximal", "magnitude", "movement"], [6, 16])
def test_a_resumed_run_equals_an_unbroken_one(method: str, stop: int, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", method=method, save_strategy="steps", save_steps=stop)
    whole.train()
    resumed = trainer(tmp_path / "whole", method=method)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    expected = weights_of(whole)
    for name, value in weights_of(resumed).items():
        # A key's bias changes no softmax: its gradient is rounding, which Adam scales to whole steps.
        assert name.endswith("key.bias") or nearly_same(value, expected[name], share=0.9), name


@pytest.mark.slow
def test_resume_with_another_pattern_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=6).train()
    other = trainer(tmp_path, SparsityConfig("block:4x1", 0.6))
    with pytest.raises(ValueError, match="saved with pattern='unstructured'"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


@pytest.mark.few(1)
@pytest.mark.parametrize("every", [4, 1])
def test_the_best_checkpoint_is_a_sparse_one(every: int, tmp_path: Path) -> None:
    class Worsen(TrainerCallback):
        """Makes the evaluation worse with every step, so that the first model looks best."""

        def on_evaluate(
            self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
        ) -> None:
            metrics["eval_step_score"] = -state.global_step

    run = trainer(
        tmp_path,
        callbacks=(Worsen(),),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        load_best_model_at_end=True,
        metric_for_best_model="step_score",
        greater_is_better=True,
    )
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-12")  # the first frozen
    assert hf_sparse.measure_sparsity(run.model, CONFIG).sparsity == pytest.approx(0.6, abs=1e-4)


def test_an_early_stop_still_gives_the_promised_zeros(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

    run = trainer(tmp_path, callbacks=(Stop(),))
    with pytest.warns(UserWarning, match="training ended at step 5 of 20"):
        run.train()
    assert hf_sparse.measure_sparsity(run.model, CONFIG).sparsity == pytest.approx(0.6, abs=1e-4)


def test_zeros_that_something_filled_are_an_error(tmp_path: Path) -> None:
    class Fill(TrainerCallback):
        def on_train_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            with torch.no_grad():
                model.bert.encoder.layer[0].output.dense.weight += 1e-3

    run = trainer(tmp_path)
    run.callback_handler.callbacks.insert(0, Fill())
    with pytest.raises(ValueError, match="Something wrote into the weights"):
        run.train()


def test_an_optimizer_without_sparse_groups_is_refused(tmp_path: Path) -> None:
    run = Trainer(
        tiny_classifier(),
        arguments(tmp_path),
        train_dataset=Sentences(),
        callbacks=[SparsityCallback(CONFIG)],
    )
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs"):
        run.train()


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match="DeepSpeed ZeRO"):
        SparsityCallback(CONFIG).on_train_begin(args, None, None)  # type: ignore[arg-type]


def test_bad_arguments_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="wanted a SparsityConfig"):
        trainer_optimizer("2:4", lr=1e-3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown method 'lottery'"):
        SparsityCallback(CONFIG, method="lottery")
    with pytest.raises(ValueError, match="unknown schedule"):
        SparsityCallback(CONFIG, schedule="cosine")
    with pytest.raises(ValueError, match="unknown penalty 'l7'"):
        trainer_optimizer(CONFIG, lr=1e-3, penalty="l7")


def test_other_targets_than_the_optimizers_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    few = SparsityConfig(sparsity=0.6, targets="layer.0.*")
    run.optimizer_cls_and_kwargs = trainer_optimizer(few, lr=1e-3)
    with pytest.raises(ValueError, match="Give the same SparsityConfig"):
        run.train()


@pytest.mark.slow
def test_a_second_run_of_a_trainer_is_refused_clearly(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    with pytest.raises(ValueError, match="Make a new Trainer"):
        run.train()


def test_settings_that_the_config_owns_are_refused(tmp_path: Path) -> None:
    for setting in ({"pattern": "2:4"}, {"frozen": True}, {"transposed": True}):
        with pytest.raises(ValueError, match="cannot be given to trainer_optimizer"):
            trainer_optimizer(CONFIG, lr=1e-3, **setting)
    with pytest.raises(ValueError, match="wanted a SparsityConfig"):
        SparsityCallback("2:4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not have the callback"):
        SparsityCallback(CONFIG).log_through(
            Trainer(tiny_classifier(), TrainingArguments(str(tmp_path)))
        )


def test_the_report_tells_how_it_was_made(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    [sparsity] = [c for c in run.callback_handler.callbacks if isinstance(c, SparsityCallback)]
    assert sparsity.report is not None
    assert sparsity.report.method == "SparseAdamW"
    assert sparsity.report.options["penalty"] == "l0"
    assert sparsity.report.options["steps"] == 20
    assert sparsity.report.zeros == round(0.6 * sparsity.report.numel)


@pytest.mark.slow
def test_fine_tuning_a_sparse_model_keeps_its_zeros(tmp_path: Path) -> None:
    model = tiny_classifier()
    hf_sparse.prune_(model, CONFIG, "magnitude")
    zeros = {name: value == 0 for name, value in model.named_parameters()}
    run = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=Sentences(),
        optimizer_cls_and_kwargs=trainer_optimizer(CONFIG, lr=1e-3, keep_zeros=True),
    )
    run.train()
    for name, value in run.model.named_parameters():
        if "layer" in name and value.ndim == 2:
            assert torch.equal(value == 0, zeros[name]), name
    with pytest.raises(ValueError, match="no zeros to keep"):
        Trainer(
            tiny_classifier(),
            arguments(tmp_path),
            train_dataset=Sentences(),
            optimizer_cls_and_kwargs=trainer_optimizer(CONFIG, lr=1e-3, keep_zeros=True),
        ).train()
