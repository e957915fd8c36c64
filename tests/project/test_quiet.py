"""Our calls do not let other packages warn of what the caller cannot change."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest

import hf_sparse
from tests.support.tiny_models import tiny_batches, tiny_model

CONFIG = hf_sparse.SparsityConfig("2:4")


def lora(model: Any, **settings: Any) -> Any:
    settings = {"r": 2, "target_modules": ["c_attn"], **settings}
    return hf_sparse.get_peft_model(model, peft.LoraConfig(**settings))


def save_and_load(model: Any, folder: Path) -> None:
    adapted = lora(tiny_sparse("gpt2"))
    adapted.save_pretrained(folder)
    hf_sparse.load_adapter(model, folder)


def tiny_sparse(family: str) -> Any:
    model = tiny_model(family)
    hf_sparse.prune_(model, CONFIG, "magnitude")
    return model


CALLS: dict[str, tuple[str, Callable[[Any, Path], Any]]] = {
    "get_peft_model": ("gpt2", lambda model, _: lora(model)),
    "merge_adapters_": (
        "gpt2",
        lambda model, _: hf_sparse.merge_adapters_(lora(model, lora_bias=True)),
    ),
    "load_adapter": ("gpt2", save_and_load),
    "recover_ by finetune": ("llama", lambda m, _: hf_sparse.recover_(m, tiny_batches("llama"))),
    "recover_ by lora": (
        "llama",
        lambda m, _: hf_sparse.recover_(m, tiny_batches("llama"), "lora"),
    ),
    "recover_ by shira": (
        "llama",
        lambda m, _: hf_sparse.recover_(m, tiny_batches("llama"), "shira", r=2),
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_adapters_come_without_warnings_of_others(call: str, tmp_path: Path) -> None:
    family, run = CALLS[call]
    model = tiny_sparse(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, tmp_path)


def test_weights_on_the_disk_are_no_warning_where_they_are_meant_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    logger = logging.getLogger("accelerate.big_modeling")
    logger.addHandler(caplog.handler)  # accelerate's loggers do not propagate everywhere
    try:
        hf_sparse.prune_checkpoint(
            tmp_path / "dense", tmp_path / "sparse", CONFIG, "wanda", tiny_batches("llama")
        )
    finally:
        logger.removeHandler(caplog.handler)
    assert "offloaded to the disk" not in caplog.text
    assert not logger.filters
