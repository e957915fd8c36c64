"""An optimizer that was to make weights sparse, and that nothing steers, says so at once."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_sparse
from hf_sparse import (
    SparseAdamW,
    SparseSGD,
    Sparsifier,
    SparsityCallback,
    SparsityConfig,
    add_shrinkage_,
    freeze_zeros_,
    sparse_param_groups,
    trainer_optimizer,
)
from tests.support.tiny_models import tiny_classifier

CONFIG = SparsityConfig(sparsity=0.5)
MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SparseAdamW": SparseAdamW,
    "SparseSGD": SparseSGD,
    "NAdam": lambda params, lr, **settings: add_shrinkage_(
        torch.optim.NAdam(params, lr=lr), **settings
    ),
}


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(8, 8, generator=generator)) for _ in range(2)]


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("name", MAKERS)
def test_without_lam_the_first_step_warns_and_the_others_do_not(name: str) -> None:
    optimizer = MAKERS[name](weights(), lr=1e-3)
    message = rf"{name} shrinks nothing: .*lam=\.\.\..*hf_sparse.Sparsifier"
    with pytest.warns(UserWarning, match=message) as told:
        step(optimizer)
    assert [Path(one.filename).name for one in told] == [Path(__file__).name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer)
    assert optimizer.param_groups[0]["lam"] == 0


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("lam", [0, 0.0, 0.5])
def test_a_lam_that_was_given_is_taken_without_a_word(name: str, lam: float) -> None:
    optimizer = MAKERS[name](weights(), lr=1e-3, lam=lam)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer)
    assert optimizer.param_groups[0]["lam"] == lam


@pytest.mark.parametrize("settings", [{"lam": 0.0}, {}])
def test_no_strength_is_torch_bit_for_bit(settings: dict[str, Any]) -> None:
    ours, theirs = weights(), weights()
    sparse, dense = SparseAdamW(ours, lr=1e-2, **settings), torch.optim.AdamW(theirs, lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(5):
            step(sparse)
            step(dense)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_steers_keeps_it_quiet() -> None:
    model = tiny_classifier()
    optimizers = []
    steered = SparseAdamW(sparse_param_groups(model, CONFIG), lr=1e-3)
    sparsifier = Sparsifier(steered, CONFIG, total_steps=4)
    assert sparsifier.lam == 0
    optimizers.append(steered)
    frozen = SparseAdamW(weights(), lr=1e-3)
    frozen.param_groups[0]["params"][0].data[0] = 0
    freeze_zeros_(frozen)
    optimizers.append(frozen)
    optimizers.append(SparseAdamW([{"params": weights(), "pattern": None}], lr=1e-3))
    one, other = weights()
    optimizers.append(SparseAdamW([{"params": [one], "lam": 0.1}, {"params": [other]}], lr=1e-3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optimizer in optimizers:
            step(optimizer)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_warns_too(copier: Callable[[Any], Any]) -> None:
    twin = copier(SparseAdamW(weights(), lr=1e-3))
    with pytest.warns(UserWarning, match="shrinks nothing"):
        step(twin)


def test_a_state_of_before_the_first_step_can_be_loaded() -> None:
    saved = SparseAdamW(weights(), lr=1e-3).state_dict()
    model = tiny_classifier()
    optimizer = SparseAdamW(sparse_param_groups(model, CONFIG), lr=1e-3, penalty="l1")
    fresh = copy.deepcopy(optimizer.state_dict())
    sparsifier = Sparsifier(optimizer, CONFIG, total_steps=20, interval=1)
    optimizer.load_state_dict(fresh)  # lam is None in there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(20):
            step(optimizer)
            sparsifier.step()
    sparsifier.check()
    assert saved["param_groups"][0]["lam"] is None


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.arange(6) + index, "labels": index % 3}


def run(tmp_path: Path, *, callbacks: Any = (), **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    return Trainer(
        tiny_classifier(),
        arguments,
        train_dataset=Rows(),
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=trainer_optimizer(CONFIG, **{"lr": 1e-3, **settings}),
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("optimizer_cls", [SparseAdamW, SparseSGD, torch.optim.AdamW])
def test_a_trainer_without_the_callback_is_refused_before_it_trains(
    optimizer_cls: Any, tmp_path: Path
) -> None:
    trainer = run(tmp_path, optimizer_cls=optimizer_cls)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match=r"SparsityCallback\(config\).*lam=.*keep_zeros=True"):
        trainer.train()
    assert all(
        torch.equal(before[name], value) for name, value in trainer.model.state_dict().items()
    )


@pytest.mark.slow
def test_a_trainer_with_the_callback_or_lam_trains(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = run(tmp_path, callbacks=[SparsityCallback(CONFIG)])
        trainer.train()
        assert hf_sparse.measure_sparsity(trainer.model, CONFIG).sparsity == pytest.approx(
            0.5, abs=1e-3
        )
        run(tmp_path, lam=0.0).train()
        shrunk = run(tmp_path, lam=1e4)
        shrunk.train()
        assert hf_sparse.measure_sparsity(shrunk.model, CONFIG).sparsity > 0.5
