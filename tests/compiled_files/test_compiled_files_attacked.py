"""Compiled models that somebody changed: an error, or a model that reads its own memory."""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse.formats import FormatError
from tests.support.compiled_folders import MODELS, Tensors, saved, write


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_changed_loads(name: str, tmp_path: Path) -> None:
    hf_sparse.load_compiled(write(tmp_path / "same", *saved(name)))


BLOCK = "stack.blocks.0."
CASES: dict[str, tuple[str, Callable[[dict[str, Any], Tensors], object], str]] = {}


def case(name: str, model: str, message: str) -> Callable:
    def add(change: Callable[[dict[str, Any], Tensors], object]) -> None:
        CASES[name] = (model, change, message)

    return add


@case("offsets that wrap around", "llama", "chunks go back")
def _(described: dict, t: Tensors) -> None:
    chunks = t[f"{BLOCK}up.0.chunks"]
    assert len(chunks) == 5
    last = int(chunks[4, 3] - chunks[3, 3])
    chunks[:, 3] = torch.tensor([0, 2**62, -(2**62) - 1, -(1 << 40), last])


@case("offsets beyond the stream", "llama", "are cut off")
def _(described: dict, t: Tensors) -> None:
    t[f"{BLOCK}up.0.chunks"][1:, 3] += 2**62


@case("counts whose product wraps around", "llama", "more nonzeros than columns")
def _(described: dict, t: Tensors) -> None:
    t[f"{BLOCK}up.0.groups"][0, 2] = 2**31 - 1


@case("a short bias", "gpt2", "bias has 50 numbers, not 52")
def _(described: dict, t: Tensors) -> None:
    t[f"{BLOCK}up.bias"] = t[f"{BLOCK}up.bias"][:50]


@case("no bias and no word of it", "llama", "its weight for single tokens is missing")
def _(described: dict, t: Tensors) -> None:
    for name in ("words", "single_values", "starts"):
        t.pop(f"{BLOCK}down.{name}")


@case("a short norm", "gpt2", "norms")
def _(described: dict, t: Tensors) -> None:
    t[f"{BLOCK}norms.0.weight"] = t[f"{BLOCK}norms.0.weight"][:31]


@case("a repeated row", "llama", "in a panel twice")
def _(described: dict, t: Tensors) -> None:
    order = t[f"{BLOCK}out.0.order"]
    order[0] = order[2]


@case("a row that is left out", "llama", "never begun|out of range")
def _(described: dict, t: Tensors) -> None:
    order = t[f"{BLOCK}out.0.order"]
    order[order == 5] = 7


@case("a panel of the next columns", "llama", "a panel begins")
def _(described: dict, t: Tensors) -> None:
    t[f"{BLOCK}down.0.panels"][0, 0] = 1


@case("bits beyond the last column", "gpt2", "stand for no row or no column")
def _(described: dict, t: Tensors) -> None:
    words = t[f"{BLOCK}down.words"].view(torch.int64)
    assert words.shape == (8, 4)  # 50 columns: the last word has 2
    words[0, 3] ^= 1 << 7


@case("bits beyond the last row", "gpt2", "stand for no row or no column")
def _(described: dict, t: Tensors) -> None:
    words = t[f"{BLOCK}up.words"].view(torch.int64)
    assert words.shape == (13, 2)  # 50 rows: the last group has 2
    words[12, 0] ^= 1 << 40


@case("a bit more than values", "gpt2", "starts do not match the bits")
def _(described: dict, t: Tensors) -> None:
    words = t[f"{BLOCK}qkv.words"].view(torch.int64)
    words[0, 0] ^= 1


@case("more values than bits", "gpt2", "values are cut off")
def _(described: dict, t: Tensors) -> None:
    values = t[f"{BLOCK}qkv.single_values"]
    t[f"{BLOCK}qkv.single_values"] = torch.cat([values, values])


@case("no tensor elements", "gpt2", "cut off")
def _(described: dict, t: Tensors) -> None:
    t[f"{BLOCK}qkv.0.indices"] = t[f"{BLOCK}qkv.0.indices"][:0]


@case("offsets of another type", "gpt2", "chunks are int32")
def _(described: dict, t: Tensors) -> None:
    t[f"{BLOCK}qkv.0.chunks"] = t[f"{BLOCK}qkv.0.chunks"].int()


@case("signed columns", "gpt2", "indices are int8")
def _(described: dict, t: Tensors) -> None:
    t[f"{BLOCK}qkv.0.indices"] = t[f"{BLOCK}qkv.0.indices"].view(torch.int8)


@case("a tensor too many", "gpt2", "which it does not need")
def _(described: dict, t: Tensors) -> None:
    t[f"{BLOCK}qkv.dense_too"] = torch.zeros(3)


@case("a layer in two parts", "gpt2", "is cut into 2 parts")
def _(described: dict, t: Tensors) -> None:
    up = described["blocks"][0]["linears"]["up"]
    (part,) = up["parts"]
    for number in range(len(part)):
        for name in [n for n in t if n.startswith(f"{BLOCK}up.{number}.")]:
            t[name.replace(f"up.{number}.", f"up.{number + len(part)}.")] = t[name].clone()
    for name in ("words", "single_values", "starts"):
        t.pop(f"{BLOCK}up.{name}")
    t[f"{BLOCK}up.single"] = torch.zeros(52, 64)
    up["parts"], up["edges"], up["zeros"] = [part, copy.deepcopy(part)], [0, 32, 64], 0


def numbers(described: dict, linear: str = "up") -> dict[str, Any]:
    found: dict[str, Any] = described["blocks"][0]["linears"][linear]["parts"][0][0]
    return found


@case("rows without end", "gpt2", "for 68719476736 rows")
def _(described: dict, t: Tensors) -> None:
    numbers(described)["rows"] = 1 << 36


@case("columns that are no number", "gpt2", "its sizes are")
def _(described: dict, t: Tensors) -> None:
    numbers(described)["columns"] = 32.0


@case("rows that are no blocks", "gpt2", "sizes|rows")
def _(described: dict, t: Tensors) -> None:
    numbers(described)["rows"] = 51


@case("neurons without end", "gpt2", "100000000 neurons, and 50")
def _(described: dict, t: Tensors) -> None:
    described["stack"]["intermediate"] = 100_000_000


@case("zeros without end", "gpt2", "zeros of")
def _(described: dict, t: Tensors) -> None:
    described["blocks"][0]["linears"]["up"]["zeros"] = 10**30


@case("a name that is none", "gpt2", "is called 7")
def _(described: dict, t: Tensors) -> None:
    described["blocks"][0]["linears"]["up"]["name"] = 7


@case("negative heads", "gpt2", "heads|a size")
def _(described: dict, t: Tensors) -> None:
    described["stack"]["heads"] = described["stack"]["key_heads"] = -4


@case("more than there should be", "gpt2", "its description")
def _(described: dict, t: Tensors) -> None:
    described["blocks"][0]["linears"]["up"]["more"] = 1


@case("words that nobody embeds", "llama", "weights do not fit")
def _(described: dict, t: Tensors) -> None:
    described["config"]["vocab_size"] = 12_000_000_000


@case("blocks without end", "gpt2", "there are 2 blocks")
def _(described: dict, t: Tensors) -> None:
    described["config"]["n_layer"] = 10**29


@case("blocks without end by another name", "gpt2", "there are 2 blocks")
def _(described: dict, t: Tensors) -> None:
    described["config"]["num_hidden_layers"] = 10**29


@case("labels without end", "gpt2", "num_labels")
def _(described: dict, t: Tensors) -> None:
    described["config"].update(id2label=None, label2id=None, num_labels=10**10)


@case("a family that is not compiled", "gpt2", "family 'stablelm'")
def _(described: dict, t: Tensors) -> None:
    described["config"].update(model_type="stablelm", num_hidden_layers=10**29)


@case("tied to nothing", "gpt2", "nowhere")
def _(described: dict, t: Tensors) -> None:
    described["tied"]["lm_head.weight"] = "nowhere"


@case("tied and stored", "gpt2", "stored, and tied")
def _(described: dict, t: Tensors) -> None:
    described["tied"]["transformer.ln_f.weight"] = "transformer.ln_f.bias"


@case("another save's description", "gpt2", "not saved together")
def _(described: dict, t: Tensors) -> None:
    described["id"] = "0" * 32


@case("no id", "gpt2", "not saved together")
def _(described: dict, t: Tensors) -> None:
    t.pop("id")


@pytest.mark.few(18)
@pytest.mark.parametrize("name", CASES)
def test_what_was_changed_is_found(name: str, tmp_path: Path) -> None:
    model, change, message = CASES[name]
    described, tensors = saved(model)
    change(described, tensors)
    folder = write(tmp_path / "changed", described, tensors)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=message):
        hf_sparse.load_compiled(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes
