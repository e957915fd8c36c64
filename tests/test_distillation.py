"""Distillation: the loss against its formula, and what it must not touch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, BertConfig, Trainer, TrainingArguments

from hf_sparse import Distillation, distillation
from tests.support.tiny_models import CONFIGS, tiny_batches, tiny_classifier, tiny_model


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model.train()


def student_of(teacher: Any, noise: float = 0.05) -> Any:
    student = copy.deepcopy(teacher).requires_grad_(True)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += noise * torch.randn_like(parameter)
    return without_dropout(student)


def batch(padded: bool = True) -> dict[str, Tensor]:
    [inputs] = tiny_batches("bert", 1, padded=padded)
    return {**inputs, "labels": torch.tensor([0, 2])}


def entropies(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) at a temperature, one per row, in double precision."""
    p = (teacher.double() / temperature).softmax(-1)
    q = (student.double() / temperature).softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_loss_of_a_classifier_is_the_formula(weight: float) -> None:
    teacher = tiny_classifier()
    student = student_of(teacher)
    inputs = batch()
    plain = student(**inputs)
    wanted = entropies(plain.logits, teacher(**inputs).logits, 3.0).mean() * 9
    Distillation(teacher, logits=weight, temperature=3.0).attach(student)
    found = student(**inputs).loss
    assert float(found) == pytest.approx(
        float((1 - weight) * plain.loss + weight * wanted), rel=1e-5
    )
    found.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.classifier.weight.grad.abs().sum() > 0


def test_hidden_states_count_without_padding() -> None:
    teacher = tiny_classifier()
    student = student_of(teacher)
    inputs = batch()
    mine = student(**inputs, output_hidden_states=True)
    theirs = teacher(**inputs, output_hidden_states=True)
    kept = inputs["attention_mask"].bool()
    errors = [
        (a[kept] - b[kept]).square().mean()
        for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True)
    ]
    Distillation(teacher, logits=0.0, hidden=2.0).attach(student)
    wanted = float(mine.loss + 2.0 * sum(errors) / len(errors))
    assert float(student(**inputs).loss) == pytest.approx(wanted, rel=1e-5)
    changed = dict(inputs, input_ids=torch.where(kept, inputs["input_ids"], 7))
    assert float(student(**changed).loss) == pytest.approx(wanted, rel=1e-5)


def test_a_model_like_its_teacher_has_nothing_to_learn() -> None:
    teacher = tiny_classifier()
    student = without_dropout(copy.deepcopy(teacher))
    Distillation(teacher, logits=1.0, hidden=1.0).attach(student)
    assert float(student(**batch()).loss) == pytest.approx(0.0, abs=1e-6)


def test_evaluation_and_removal_leave_the_model_as_it_was() -> None:
    teacher = tiny_classifier()
    student = student_of(teacher)
    inputs = batch()
    wanted = float(student(**inputs).loss)
    distillation = Distillation(teacher).attach(student)
    assert float(student(**inputs).loss) != wanted
    student.eval()
    assert float(student(**inputs).loss) == pytest.approx(wanted, rel=1e-5)
    assert student(**inputs).hidden_states is None
    student.train()
    distillation.remove()
    assert float(student(**inputs).loss) == pytest.approx(wanted, rel=1e-5)
    assert list(student.state_dict()) == list(teacher.state_dict())


def test_regression_question_answering_and_language_models() -> None:
    torch.manual_seed(0)
    teacher = tiny_classifier()
    teacher.config.num_labels = 1
    teacher.num_labels = 1
    teacher.config.problem_type = "regression"
    teacher.classifier = torch.nn.Linear(teacher.config.hidden_size, 1)
    student = student_of(teacher)
    inputs = dict(batch(), labels=torch.tensor([0.5, 2.0]))
    wanted = (student(**inputs).logits - teacher(**inputs).logits).square().mean()
    Distillation(teacher, logits=1.0).attach(student)
    assert float(student(**inputs).loss) == pytest.approx(float(wanted), rel=1e-5)

    described = CONFIGS["bert"]
    assert isinstance(described, BertConfig)
    reader = AutoModelForQuestionAnswering.from_config(described).eval()
    student = student_of(reader)
    [inputs] = tiny_batches("bert", 1)
    places = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    mine, theirs = student(**inputs, **places), reader(**inputs)
    wanted = (
        4
        * torch.stack(
            [
                entropies(mine[name], theirs[name], 2.0).mean()
                for name in ("start_logits", "end_logits")
            ]
        ).mean()
    )
    Distillation(reader, logits=1.0).attach(student)
    assert float(student(**inputs, **places).loss) == pytest.approx(float(wanted), rel=1e-4)

    writer = tiny_model("gpt2")
    student = student_of(writer)
    [inputs] = tiny_batches("gpt2", 1)
    labels = inputs["input_ids"].clone()
    labels[:, :5] = -100
    mine, theirs = student(**inputs).logits, writer(**inputs).logits
    # The logits of a token predict the next one: those count whose next token has a label.
    counted = labels[:, 1:] != -100
    wanted = 4 * entropies(mine[:, :-1][counted], theirs[:, :-1][counted], 2.0).mean()
    Distillation(writer, logits=1.0).attach(student)
    assert float(student(**inputs, labels=labels).loss) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.few(1)
@pytest.mark.parametrize("logits", [1.0, 0.5])
def test_gradient_accumulation_changes_nothing_for_language_models(
    logits: float, tmp_path: Path
) -> None:
    teacher = tiny_model("gpt2")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (4, 12, 7, 12):
        ids = torch.randint(2, 200, (12,), generator=generator)
        labels = ids.clone()
        labels[length:] = -100
        rows.append({"input_ids": ids, "labels": labels})
    found = []
    for size in (4, 1):
        student = student_of(teacher)
        Distillation(teacher, logits=logits).attach(student)
        args = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_steps=1,
            learning_rate=1e-2,
            optim="sgd",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            max_grad_norm=0.0,
        )
        Trainer(student, args, train_dataset=rows).train()
        found.append(
            torch.cat([parameter.detach().flatten() for parameter in student.parameters()])
        )
    start = torch.cat([p.detach().flatten() for p in student_of(teacher).parameters()])
    moved = (found[0] - start).norm()
    assert moved > 0
    assert (found[0] - found[1]).norm() < 1e-3 * moved


def test_bad_input_is_refused() -> None:
    teacher = tiny_classifier()
    for settings in ({"logits": 1.5}, {"logits": 0.0}, {"hidden": -1.0}):
        with pytest.raises(ValueError, match="wanted 0 <= logits <= 1"):
            Distillation(teacher, **settings)
    with pytest.raises(ValueError, match="logits is nan; wanted a number"):
        Distillation(teacher, logits=float("nan"))
    with pytest.raises(ValueError, match="temperature is 0"):
        Distillation(teacher, temperature=0.0)
    with pytest.raises(ValueError, match="its own teacher"):
        Distillation(teacher).attach(teacher)
    student = student_of(teacher)
    distillation = Distillation(teacher).attach(student)
    with pytest.raises(ValueError, match="attached already"):
        distillation.attach(student)
    inputs = batch()
    del inputs["labels"]
    with pytest.raises(ValueError, match="no loss"):
        student(**inputs)
    distillation.remove()
    other = without_dropout(tiny_classifier())
    other.classifier = torch.nn.Linear(32, 5)
    other.num_labels = other.config.num_labels = 5
    Distillation(teacher).attach(other)
    with pytest.raises(ValueError, match="same head"):
        other(**batch())
    shallow = tiny_classifier()
    shallow.bert.encoder.layer = shallow.bert.encoder.layer[:1]
    student = student_of(teacher)
    Distillation(shallow, hidden=1.0).attach(student)
    with pytest.raises(ValueError, match="hidden states"):
        student(**batch())


def test_a_classifier_in_trainer_gets_the_whole_loss_of_the_teacher(tmp_path: Path) -> None:
    teacher = tiny_classifier()
    student = student_of(teacher)
    [inputs] = tiny_batches("bert", 1)
    rows = [{"input_ids": ids, "labels": 1} for ids in inputs["input_ids"]]
    wanted = 4 * entropies(student(**inputs).logits, teacher(**inputs).logits, 2.0).mean()
    Distillation(teacher, logits=1.0).attach(student)
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, max_steps=1, logging_steps=1, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    run = Trainer(student, args, train_dataset=rows)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(float(wanted), rel=1e-3)


def test_several_labels_and_several_values() -> None:
    for problem in ("multi_label_classification", "regression"):
        teacher = tiny_classifier()
        teacher.config.problem_type = problem
        student = student_of(teacher)
        inputs = dict(batch(), labels=torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
        mine, theirs = student(**inputs).logits, teacher(**inputs).logits
        if problem == "regression":
            wanted = float((mine - theirs).square().mean())
        else:
            pairs = [
                torch.stack([logits.double() / 2, torch.zeros_like(logits).double()], dim=-1)
                for logits in (mine, theirs)
            ]
            wanted = float(4 * entropies(pairs[0], pairs[1], 1.0).mean())
        Distillation(teacher, logits=1.0).attach(student)
        assert float(student(**inputs).loss) == pytest.approx(wanted, rel=1e-4)


def test_teachers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="takes a model, not a str"):
        Distillation("bert-base-uncased")  # type: ignore[arg-type]
    student = without_dropout(tiny_classifier())
    headless = Distillation(tiny_model("bert")).attach(student)
    with pytest.raises(ValueError, match=r"same\s+head"):
        student(**batch())
    headless.remove()
    with pytest.raises(ValueError, match="shares weights"):
        Distillation(copy.copy(student)).attach(student)
    with pytest.raises(ValueError, match="encoder-decoder"):
        Distillation(tiny_model("t5")).attach(tiny_model("t5", seed=1))
    small = tiny_classifier()
    small.config.vocab_size = 100
    with pytest.raises(ValueError, match="knows 256 tokens, its teacher 100"):
        Distillation(small).attach(without_dropout(tiny_classifier()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_tokens_at_a_time_are_the_whole(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "_CHUNK", 3 * 256)  # three tokens
    teacher = tiny_model("llama").to(dtype)
    student = without_dropout(tiny_model("llama", seed=1))
    [batch] = tiny_batches("llama", 1, length=11)
    labels = batch["input_ids"].clone()
    labels[0, :5] = -100
    Distillation(teacher, logits=0.7, temperature=3.0).attach(student)
    found = student(**batch, labels=labels)
    mine = torch.autograd.grad(found.loss, list(student.parameters()))
    student._forward_hooks.clear()
    student._forward_pre_hooks.clear()
    plain = student(**batch, labels=labels)
    chosen = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    with torch.no_grad():
        taught = teacher(**batch).logits.float()[chosen]
    p = (taught / 3).log_softmax(-1)
    q = (plain.logits[chosen] / 3).log_softmax(-1)
    wanted = 0.3 * plain.loss + 0.7 * 9 * (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(found.loss, wanted)
    theirs = torch.autograd.grad(wanted, list(student.parameters()))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_one_more_tensor_of_the_vocabularys_size_is_kept() -> None:
    teacher, student = tiny_model("llama"), without_dropout(tiny_model("llama", seed=1))
    [batch] = tiny_batches("llama", 1)
    size = batch["input_ids"].numel() * 256

    def kept() -> int:
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if tensor.numel() >= size - 2 * 256:
                saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            student(**batch, labels=batch["input_ids"])
        return len(saved)

    plain = kept()
    Distillation(teacher, logits=0.5).attach(student)
    assert kept() == plain + 1
