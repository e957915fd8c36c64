"""Compiled models of the layout before today's: what ties both files, and what machine code follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, GPT2Config, LlamaConfig

import hf_sparse
from hf_sparse.compiled_files.old_layout import check_zeros
from hf_sparse.formats import FormatError
from hf_sparse.runtime.model.compiled import stack_of
from tests.compiled_files.test_compiled_files_attacked import CASES
from tests.support.compiled_folders import DECODER, MODELS, as_old, logits, saved, write
from tests.support.sparse_models import random_model

WARNS = "ignore:.*without an id:UserWarning"


@pytest.mark.parametrize("name", MODELS)
def test_an_old_layout_gives_the_same_model(name: str, tmp_path: Path) -> None:
    described, tensors = saved(name)
    new = hf_sparse.load_compiled(write(tmp_path / "new", described, tensors))
    as_old(described, tensors)
    with pytest.warns(UserWarning, match="without an id") as warned:
        old = hf_sparse.load_compiled(write(tmp_path / "old", described, tensors))
    assert [warning.filename for warning in warned] == [__file__]
    torch.testing.assert_close(logits(old), logits(new))


@pytest.mark.few(9)
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"no id", "another save's description"}))
@pytest.mark.filterwarnings(WARNS)
def test_what_was_changed_is_found(name: str, tmp_path: Path) -> None:
    model, change, message = CASES[name]
    described, tensors = saved(model)
    as_old(described, tensors)
    change(described, tensors)
    with pytest.raises(FormatError, match=message):
        hf_sparse.load_compiled(write(tmp_path / "changed", described, tensors))


def test_an_old_description_beside_new_weights_is_found(tmp_path: Path) -> None:
    described, tensors = saved("gpt2")
    own = tensors["id"]
    as_old(described, tensors)
    with pytest.raises(FormatError, match="not saved together"):
        hf_sparse.load_compiled(write(tmp_path / "old", described, {**tensors, "id": own}))


def test_a_new_description_beside_old_weights_is_found(tmp_path: Path) -> None:
    described, tensors = saved("gpt2")
    tensors.pop("id")
    with pytest.raises(FormatError, match="not saved together"):
        hf_sparse.load_compiled(write(tmp_path / "new", described, tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: t.pop("model.transformer.wpe.weight"), "wpe.weight is missing"),
        (lambda d, t: t.update({"model.more": torch.zeros(2)}), "model.more is not described"),
        (lambda d, t: t.update({"more": torch.zeros(2)}), "more is not described"),
        (lambda d, t: d["types"].pop("transformer.wpe.weight"), "wpe.weight is not described"),
        (lambda d, t: d["types"].update({"transformer.wpe.weight": "torch.float16"}), "saved as"),
        (lambda d, t: d.pop("types"), "types"),
        (lambda d, t: d.update(layout=[3, 1, 1, 1]), "another layout"),
        (lambda d, t: d.update(layout=[2, *d["layout"][1:]]), "another layout"),
    ],
)
def test_what_is_outside_of_the_blocks_is_checked(  # type: ignore[no-untyped-def]
    change, message: str, tmp_path: Path
) -> None:
    described, tensors = saved("gpt2")
    as_old(described, tensors)
    change(described, tensors)
    folder = write(tmp_path / "changed", described, tensors, described_too=False)
    with pytest.raises(FormatError, match=message):
        hf_sparse.load_compiled(folder)


def test_two_saves_of_one_architecture_are_told_by_their_zeros(tmp_path: Path) -> None:
    described, tensors = saved("gpt2")
    as_old(described, tensors)
    config = GPT2Config(n_embd=32, n_inner=50, n_layer=2, n_head=4, n_positions=64, **DECODER)
    other = hf_sparse.compile(random_model(config, 0.7))
    hf_sparse.save_compiled(other, tmp_path / "other")
    theirs = load_file(tmp_path / "other" / "compiled.safetensors")
    theirs.pop("id")
    # Or their layers are packed in other ways, as the target asks.
    told = r"has 2\d+ zeros, and its description tells of 1|is missing"
    with pytest.raises(FormatError, match=told):
        hf_sparse.load_compiled(write(tmp_path / "mixed", described, theirs))


SIZES = {
    "hidden_size": 24,
    "intermediate_size": 1544,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "vocab_size": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


@pytest.mark.few(7)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [
        (None, 0.0),
        ("unstructured", 0.7),
        ("unstructured", 0.99),  # rows of which a panel has none, so that some lack a second one
        ("2:4", 0.5),
        ("block:2x1", 0.7),
        ("block:2x1", 0.99),
        ("block:4x1", 0.7),
    ],
)
@pytest.mark.parametrize("config", [BertConfig, LlamaConfig])
def test_zeros_are_counted_in_packed_weights(
    config: Any, pattern: str | None, sparsity: float, kind: torch.dtype
) -> None:
    model = random_model(config(**SIZES), 0.0).to(kind)
    if pattern is not None:
        hf_sparse.prune_(model, hf_sparse.SparsityConfig(pattern, sparsity), "magnitude")
    stack = stack_of(hf_sparse.compile(model))
    assert any(linear.zeros for linear in stack.linears) == (pattern is not None)
    check_zeros(stack)
