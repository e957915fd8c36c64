"""A compiled model gives no state dict: its packed weights would be missing from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_sparse
from hf_sparse.compiled_files.skeleton import plain_state
from tests.support.closeness import same
from tests.support.tiny_models import tiny_batches, tiny_model


def compiled_model(family: str) -> tuple[Any, Any]:
    model = tiny_model(family)
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.6), "magnitude")
    return model, hf_sparse.compile(model)


@pytest.mark.parametrize("family", ["llama", "bert", "stablelm"])  # the last one layer by layer
def test_the_state_dict_of_a_compiled_model_is_refused(family: str, tmp_path: Path) -> None:
    model, compiled = compiled_model(family)
    for module in (compiled, compiled.base_model, nn.Sequential(compiled)):
        with pytest.raises(ValueError, match=r"packed weights, which .*state dicts.* cannot hold"):
            torch.save(module.state_dict(), tmp_path / "state.pt")
    assert not (tmp_path / "state.pt").exists()
    assert model.state_dict().keys() == plain_state(model).keys()


def test_parts_of_a_compiled_model_that_are_not_packed_give_their_state() -> None:
    _, compiled = compiled_model("llama")
    assert compiled.get_input_embeddings().state_dict().keys() == {"weight"}
    assert compiled.get_output_embeddings().state_dict().keys() == {"weight"}


def test_a_compiled_model_is_saved_by_save_compiled(tmp_path: Path) -> None:
    _, compiled = compiled_model("llama")
    loaded = hf_sparse.load_compiled(hf_sparse.save_compiled(compiled, tmp_path))
    [batch, *_] = tiny_batches("llama")
    assert same(loaded(**batch).logits, compiled(**batch).logits)
