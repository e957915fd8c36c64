"""Models without values (on the meta device, or left on the disk) are refused by name of the weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload

import hf_sparse
from hf_sparse import SparsityConfig
from tests.arguments import test_arguments
from tests.support.exporting import skip_unless_exports
from tests.support.tiny_models import (
    prose,
    tiny_batches,
    tiny_classifier,
    tiny_model,
    tiny_tokenizer,
)

CONFIG = SparsityConfig("2:4")
EVERY_CALL = {**test_arguments.CALLS, **test_arguments.TRANSFORMERS_ONLY}
WITHOUT_LOOKING_AT_WEIGHTS = {
    *("sparse_param_groups", "merge_adapters_", "labelled_batches"),
    *("push_to_hub", "save_compiled"),  # which need a model that is saved, or compiled
}


def sparse_model() -> Any:
    model = tiny_model("llama")
    hf_sparse.prune_(model, CONFIG, "magnitude")
    return model


# Those that take any model, and those with more in their arguments than a model without values.
CALLS: dict[str, Callable[[Any, Path], Any]] = {
    **{name: call for name, call in EVERY_CALL.items() if name not in WITHOUT_LOOKING_AT_WEIGHTS},
    "teacher": lambda model, _: hf_sparse.recover_(
        sparse_model(), tiny_batches("llama"), teacher=model
    ),
    "get_peft_model": lambda model, _: hf_sparse.get_peft_model(
        model, peft.LoraConfig(target_modules=["up_proj"])
    ),
    "perplexity": lambda model, _: hf_sparse.perplexity(
        model, tiny_tokenizer(), prose()[:2000], 16
    ),
    "freeze_zeros_": lambda model, _: hf_sparse.freeze_zeros_(
        hf_sparse.SparseAdamW(hf_sparse.sparse_param_groups(model, CONFIG))
    ),
}


@pytest.mark.few(16)
@pytest.mark.parametrize("part", ["", "model.layers.1"])
@pytest.mark.parametrize("call", CALLS)
def test_what_has_no_values_is_refused(call: str, part: str, tmp_path: Path) -> None:
    skip_unless_exports(call)
    model = sparse_model()
    model.get_submodule(part).to("meta")
    message = r"weight (is on the meta device|has no values)"
    with pytest.raises(ValueError, match=message):
        CALLS[call](model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_models_that_accelerate_offloads_are_measured() -> None:
    model, text = sparse_model(), prose()[:2000]
    wanted = hf_sparse.perplexity(model, tiny_tokenizer(), text, 16)
    offloaded = cpu_offload(model, torch.device("cpu"))
    found = hf_sparse.perplexity(offloaded, tiny_tokenizer(), text, 16)
    assert found == pytest.approx(wanted, rel=1e-4)
    classifier = cpu_offload(tiny_classifier(), torch.device("cpu"))
    hf_sparse.accuracy(classifier, tiny_tokenizer(), ["a word"], [0])
    with pytest.raises(ValueError, match=r"measure_sparsity: \S+weight is on the meta device"):
        hf_sparse.measure_sparsity(offloaded)
