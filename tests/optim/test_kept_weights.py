"""The fate of a kept weight that lands on exactly zero: the same on every way to keep zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import hf_sparse
from hf_sparse import KeepZeros, SparseSGD, Sparsifier, SparsityConfig, sparse_param_groups
from hf_sparse.optim.zeros import sparse_layers
from tests.support.tiny_models import tiny_batches, tiny_model

CONFIG = SparsityConfig("2:4")


def sparse_model(family: str) -> Any:
    model = tiny_model(family)
    hf_sparse.prune_(model, CONFIG, "magnitude")
    return model


def weights_of(model: Any) -> dict[str, Tensor]:
    return {layer.weight_name: layer.parameter for layer in sparse_layers(model, CONFIG)}


def loop_with(keep: Callable[[Any, Any], None], optimizer_of: Any) -> Callable[[Any, Path], None]:
    def run(model: Any, folder: Path) -> None:
        optimizer = optimizer_of(model)
        keep(optimizer, model)
        for steps in range(2):
            loss_after(model, steps).backward()
            optimizer.step()
            if not steps:
                check_landed(model)
            optimizer.zero_grad()

    return run


def loss_after(model: Any, steps: int) -> Tensor:
    """A loss whose gradients are the weights themselves, so that a step of 1 leads to 0; then -1."""
    weights = list(weights_of(model).values())
    if steps:
        return sum(-weight.sum() for weight in weights)
    return sum(weight.square().sum() / 2 for weight in weights)


def check_landed(model: Any) -> None:
    tiny = torch.finfo(torch.float32).tiny
    assert all(
        set(weight.unique().tolist()) == {0.0, tiny} for weight in weights_of(model).values()
    )


class ToZero(Trainer):
    """Trains on `loss_after`, whatever the batch."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 1:
            check_landed(model)
        return loss_after(model, self.state.global_step)


def trainer_with(**given: Any) -> Callable[[Any, Path], None]:
    def run(model: Any, folder: Path) -> None:
        args = TrainingArguments(
            str(folder),
            max_steps=2,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            per_device_train_batch_size=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        rows = [{"input_ids": batch["input_ids"][0]} for batch in tiny_batches("llama") * 2]
        ToZero(model, args, train_dataset=rows, **given).train()

    return run


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0)


def sparse_sgd(model: Any) -> SparseSGD:
    return SparseSGD(sparse_param_groups(model, CONFIG), lr=1.0)


def finish(optimizer: Any, model: Any) -> None:
    Sparsifier(optimizer, CONFIG, 10).finish()


WAYS: dict[str, Callable[[Any, Path], None]] = {
    "keep_zeros": loop_with(hf_sparse.keep_zeros, sgd),
    "freeze_zeros": loop_with(lambda optimizer, _: hf_sparse.freeze_zeros_(optimizer), sparse_sgd),
    "Sparsifier": loop_with(finish, sparse_sgd),
    "KeepZeros": trainer_with(
        callbacks=[KeepZeros()], optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1.0})
    ),
    "trainer_optimizer": trainer_with(
        optimizer_cls_and_kwargs=hf_sparse.trainer_optimizer(
            CONFIG, lr=1.0, optimizer_cls=SparseSGD, keep_zeros=True
        )
    ),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_a_kept_weight_that_lands_on_zero_stays_kept_and_moves_on(
    way: str, family: str, tmp_path: Path
) -> None:
    model = sparse_model(family)
    zeros = {name: weight == 0 for name, weight in weights_of(model).items()}
    WAYS[way](model, tmp_path)
    for name, weight in weights_of(model).items():
        assert torch.equal(weight == 0, zeros[name]), name
        assert (weight[~zeros[name]] == 1).all()


def test_a_scalar_and_a_vector_keep_their_fate_too() -> None:
    weights = [torch.nn.Parameter(torch.tensor(2.0)), torch.nn.Parameter(torch.tensor([0.0, 3.0]))]
    optimizer = SparseSGD(weights, lr=1.0)
    hf_sparse.freeze_zeros_(optimizer)
    for weight in weights:
        weight.grad = weight.detach().clone() + (weight.detach() == 0)
    optimizer.step()
    tiny = torch.finfo(torch.float32).tiny
    assert [weight.tolist() for weight in weights] == [tiny, [0.0, tiny]]
