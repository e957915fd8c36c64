"""What recovery chooses by itself: a rate, the best weights by held-out batches, what runs together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse import Distillation, recover_
from hf_sparse.calibration.attending import fast_attention
from hf_sparse.recovery.held_out import HeldOut, held_out_loss
from hf_sparse.recovery.training import _backward, _joined
from tests.support.sparse_models import assert_same, places, sparse_model
from tests.support.tiny_models import prose, tiny_batches, tiny_model, tiny_tokenizer


def windows(count: int = 12) -> list[Any]:
    return hf_sparse.calibration_batches(
        tiny_tokenizer(), [prose()[:30_000]], num_samples=count, window=32
    )


def labelled(count: int) -> list[dict[str, Any]]:
    return [{**batch, "labels": batch["input_ids"]} for batch in windows(count)]


def test_the_rate_with_the_least_held_out_loss_is_taken() -> None:
    def recovered(lr: Any) -> tuple[Any, Any]:
        model = sparse_model()
        return model, recover_(model, windows(), lr=lr, held_out=4)

    model, report = recovered("search")
    rate = float(next(note for note in report.notes if "learning rate" in note).split()[2][:-1])
    losses = {}
    for lr in (1e-4, 3e-4, 9e-4):  # the short runs had all eight batches, as these have
        losses[lr] = held_out_loss(recovered(lr)[0], windows()[-4:])
    assert rate == pytest.approx(min(losses, key=losses.__getitem__))
    assert report.options["lr"] == pytest.approx(rate)
    assert held_out_loss(model, windows()[-4:]) == pytest.approx(
        losses[min(losses, key=losses.get)], 1e-3
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["finetune", "lora"])
def test_a_recovery_that_harms_gives_the_weights_from_before_back(method: str) -> None:
    pytest.importorskip("peft")
    model = sparse_model()
    inputs = [torch.randint(9, 90, (1, 16), generator=torch.Generator().manual_seed(0))] * 8
    held = {"input_ids": torch.full((1, 16), 5)}
    recover_(model, [{"input_ids": inputs[0]}] * 4, lr=1e-2)  # of no use to what is held out
    start, zeros = copy.deepcopy(model.state_dict()), places(model)
    steps: list[int] = []
    handle = model.register_forward_hook(
        lambda module, args, outputs: steps.append(0) if module.training else None
    )
    report = recover_(
        model,
        [*({"input_ids": one} for one in inputs), held],
        method,
        held_out=1,
        lr=3e-2,
        accumulate=1,
    )
    handle.remove()
    after = held_out_loss(model, [held])
    assert "held-out batches" in report.notes[1]
    before = copy.deepcopy(model)
    before.load_state_dict(start)
    assert after <= held_out_loss(before, [held])
    assert_same(places(model), zeros)
    if after == held_out_loss(before, [held]):
        assert len(steps) == 4  # two looks of four, and no more


def test_the_best_weights_come_back() -> None:
    model = sparse_model()
    watch = HeldOut(model, windows(2), patience=2)
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.lm_head.weight.mul_(-5)
    assert not watch.look()
    assert watch.look()
    watch.restore_()
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert watch.best == watch.before == pytest.approx(held_out_loss(model, windows(2)))


def test_batches_that_run_together_have_the_gradients_of_single_ones() -> None:
    model = sparse_model()
    batches = labelled(3)
    assert [count for count, _ in _joined(batches)] == [3]
    total = _backward(model, batches)
    together = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    losses = [model(**batch).loss for batch in batches]
    torch.stack(losses).mean().backward()
    assert total == pytest.approx(float(sum(losses).detach()) / 3, rel=1e-2)  # type: ignore[union-attr]
    for found, parameter in zip(together, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=0.05, atol=1e-3)


def test_batches_with_padding_run_alone() -> None:
    padded = [
        {**batch, "labels": batch["input_ids"]} for batch in tiny_batches("llama", 2, padded=True)
    ]
    for batch in padded:
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    assert [count for count, _ in _joined([*padded, *labelled(2)])] == [1, 1, 2]


def test_relative_errors_of_hidden_states() -> None:
    teacher, student = tiny_model("llama"), sparse_model()
    [batch] = labelled(1)
    mine = student(**batch, output_hidden_states=True)
    theirs = teacher(**batch, output_hidden_states=True)
    shares = [
        ((a.double() - b.double()).square().sum(-1) / b.double().square().sum(-1)).mean()
        for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True)
    ]
    Distillation(teacher, logits=0.0, hidden=0.5, relative=True).attach(student)
    found = float(student.train()(**batch).loss.detach())
    assert found == pytest.approx(float(mine.loss + 0.5 * sum(shares) / len(shares)), rel=1e-5)


def test_the_own_loss_is_not_computed_where_it_does_not_count(monkeypatch: Any) -> None:
    teacher, student = tiny_model("llama"), sparse_model().train()
    [batch] = labelled(1)
    mine, theirs = (
        student(**batch).logits[0, :-1].double(),
        teacher(**batch).logits[0, :-1].double(),
    )
    p = theirs.softmax(-1)
    wanted = (p * (theirs.log_softmax(-1) - mine.log_softmax(-1))).sum(-1).mean()
    Distillation(teacher, logits=1.0, temperature=1.0).attach(student)

    def fails(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("the own loss is computed")

    monkeypatch.setattr(type(student), "loss_function", property(lambda self: fails))
    assert float(student(**batch).loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-3)


def test_fast_attention_gives_the_same_losses(monkeypatch: Any) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("sdpa")
    [batch] = labelled(1)
    wanted = model(**batch).loss
    monkeypatch.setattr("hf_sparse.calibration.attending.is_bfloat16_faster", lambda weight: True)
    with fast_attention(model, [batch]):
        assert model.config._attn_implementation == "eager"
        found = model(**batch).loss
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found, wanted)
    long = {"input_ids": torch.zeros(1, 1025, dtype=torch.long)}
    with fast_attention(model, [batch, long]):
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": "fast"}, "lr is 'fast'; wanted a number > 0, or 'search'"),
        ({"lr": "search"}, "held_out is 0. Hold some"),
        ({"held_out": 12}, "none are left to train on"),
        ({"held_out": -1}, "held_out is -1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recover_(sparse_model(), windows(), **arguments)
