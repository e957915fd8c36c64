"""The frozen mask: any optimizer, Trainer, half precision, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_sparse
from hf_sparse import KeepZeros, SparsityConfig, keep_zeros_
from hf_sparse.optim.zeros import kept_bits, mask_, refill_, unlike
from tests.support.closeness import nearly_same
from tests.support.sparse_models import assert_same, places, sparse_model
from tests.support.tiny_models import tiny_batches, tiny_model


def train(model: Any, optimizer: Any, steps: int = 4) -> None:
    family = "gpt2" if model.config.model_type == "gpt2" else "llama"
    model.train()
    for batch in (tiny_batches(family) * steps)[:steps]:
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_zeros_stay_and_the_rest_steps_as_without_the_mask(name: str, family: str) -> None:
    model = sparse_model(family)
    zeros, free = places(model), copy.deepcopy(model)
    for one, frozen in ((model, True), (free, False)):
        optimizer = OPTIMIZERS[name](one.parameters())
        if frozen:
            mask = keep_zeros_(optimizer, one)
        torch.manual_seed(0)
        train(one, optimizer, steps=1)
    mask.check()
    assert_same(places(model), zeros)
    for (key, mine), theirs in zip(model.named_parameters(), free.parameters(), strict=True):
        assert nearly_same(mine, theirs.masked_fill(zeros[key], 0) if key in zeros else theirs)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_zeros_stay_over_many_steps(pattern: str) -> None:
    model = sparse_model(pattern=pattern)
    zeros = places(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    keep_zeros_(optimizer, model)
    train(model, optimizer, steps=12)
    assert_same(places(model), zeros)
    changed = hf_sparse.measure_sparsity(
        model, SparsityConfig(pattern, None if ":" in pattern else 0.6)
    )
    assert changed.violations == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_kept_weight_that_lands_on_zero_stays_kept(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, 0.0, -2.0, 3.0]], dtype=dtype)
    kept = unlike(weight)
    assert kept.tolist() == [[1, 0, 1, 1]]
    weight.copy_(torch.tensor([[0.0, 5.0, -0.0, 4.0]]))
    refill_(weight, kept)
    tiny = torch.finfo(dtype).tiny
    assert weight.tolist() == [[tiny, 0.0, tiny, 4.0]]


def test_bfloat16_keeps_the_number_of_zeros() -> None:
    model = sparse_model().to(torch.bfloat16)
    zeros = places(model)
    # steps of exactly the size of many weights: plain training lands on zero
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    keep_zeros_(optimizer, model)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    assert_same(places(model), zeros)


def test_a_grad_scaler_and_accumulation() -> None:
    model = sparse_model()
    zeros = places(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    keep_zeros_(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # the first steps overflow
    model.train()
    for batch in tiny_batches("llama") * 4:
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch, labels=batch["input_ids"]).loss
        scaler.scale(loss * 1e30).backward() if scaler.get_scale() > 1e9 else loss.backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same(places(model), zeros)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def trainer(model: Any, folder: Path, **changes: Any) -> Trainer:
    rows = [
        {"input_ids": row, "labels": row}
        for batch in tiny_batches("llama", count=8)
        for row in batch["input_ids"]
    ]
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(str(folder), **{**settings, **changes})
    return Trainer(model, args, train_dataset=rows, callbacks=[KeepZeros()])


@pytest.mark.few(1)
@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_trainer_keeps_zeros_and_resumes_bit_for_bit(tmp_path: Path, precision: dict) -> None:
    model = sparse_model(tie_word_embeddings=False)
    start = copy.deepcopy(model)
    zeros = places(model)
    trainer(model, tmp_path, **precision).train()
    assert_same(places(model), zeros)
    resumed = trainer(start, tmp_path, **precision)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, one), other in zip(model.named_parameters(), start.parameters(), strict=True):
        assert nearly_same(one, other), name
    hf_sparse.save_pretrained(model, tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert_same(places(loaded), zeros)


def test_what_is_saved_is_checked(tmp_path: Path) -> None:
    model = sparse_model()

    class Vandal(KeepZeros):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model.model.layers[0].mlp.up_proj.weight.data += 1.0

    run = trainer(model, tmp_path)
    run.add_callback(Vandal)
    with pytest.raises(ValueError, match="something else wrote into its weights"):
        run.train()


def test_bad_input() -> None:
    dense = tiny_model("llama")
    with pytest.raises(ValueError, match="has no zeros to keep"):
        keep_zeros_(torch.optim.SGD(dense.parameters(), lr=1.0), dense)
    model = sparse_model()
    with pytest.raises(ValueError, match=r"trains none of the model.s sparse"):
        keep_zeros_(torch.optim.SGD(dense.parameters(), lr=1.0), model)
    with pytest.raises(ValueError, match=r"wanted one of torch\.optim"):
        keep_zeros_("adamw", model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    keep_zeros_(optimizer, model)
    optimizer.param_groups[0]["params"] = [
        torch.nn.Parameter(p.detach().clone()) for p in model.parameters()
    ]
    with pytest.raises(ValueError, match="replaced after keep_zeros_"):
        optimizer.step()


def test_called_again_it_replaces_itself_and_can_be_removed() -> None:
    model = sparse_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keep_zeros_(optimizer, model)
    mask = keep_zeros_(optimizer, model)
    train(model, optimizer, steps=2)
    mask.check()
    mask.remove()
    train(model, optimizer, steps=1)
    with pytest.raises(ValueError, match="zeros are not those"):
        mask.check()


def test_quantized_weights_are_refused() -> None:
    model = sparse_model()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj.weight is stored as torch.int8, quantized"):
        keep_zeros_(torch.optim.SGD(model.lm_head.parameters(), lr=1.0), model)


def test_weights_that_are_trained_later_keep_their_zeros_too() -> None:
    model = sparse_model()
    late = model.model.layers[0]
    late.requires_grad_(False)
    before = places(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mask = keep_zeros_(optimizer, model)
    late.requires_grad_(True)
    train(model, optimizer)
    mask.check()
    assert_same(places(model), before)
    other = torch.optim.SGD(late.parameters(), lr=0.1)  # which nothing keeps from filling
    train(model, other, steps=1)
    with pytest.raises(ValueError, match="something else wrote"):
        mask.check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masking_by_integers_is_exact(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 9, dtype=dtype)
    weight[::2, 1::3], weight[1::2, 2::3] = 0.0, -0.0
    weight[0, 0], weight[1, 0] = torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny / 4
    values = torch.randn(9, 7, dtype=dtype).T  # not contiguous, as a Conv1D's gradient
    values[0, 1], values[0, 0] = torch.nan, torch.inf
    wanted = torch.where(weight != 0, values, torch.zeros_like(values))
    mask_(values, kept_bits(weight))
    assert torch.equal(values, wanted)


@pytest.mark.parametrize("named", [False, True])
def test_a_few_zeros_of_an_earlier_pruning_are_kept_where_the_layer_is_named(named: bool) -> None:
    model = tiny_model("llama", intermediate_size=512)
    for targets, sparsity in (["*down_proj"], 0.004), (["*q_proj"], 0.5):
        hf_sparse.prune_(model, SparsityConfig("unstructured", sparsity, targets), "magnitude")
    few = {n: p == 0 for n, p in model.named_parameters() if n.endswith("down_proj.weight")}
    both = SparsityConfig("unstructured", 0.004, ["*q_proj", "*down_proj"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    keep_zeros_(optimizer, model, both if named else None)
    train(model, optimizer)
    assert all(zeros.any() for zeros in few.values())
    kept = [torch.equal(model.get_parameter(name) == 0, zeros) for name, zeros in few.items()]
    assert kept == [named] * len(few)
