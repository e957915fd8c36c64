"""Compiled models in files, to be changed by tests; small enough to be written hundreds of times."""

from __future__ import annotations

import copy
import functools
import json
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, PreTrainedModel

import hf_sparse
from tests.support.sparse_models import random_model
from tests.support.tiny_models import tiny_config

DECODER: dict[str, Any] = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    # Weights for single tokens as bits and as matrices, biases, and 50 neurons: no whole groups.
    "gpt2": lambda: random_model(
        GPT2Config(n_embd=32, n_inner=50, n_layer=2, n_head=4, n_positions=64, **DECODER)
    ),
    # Four chunks of rows, gates, and two-byte weights.
    "llama": lambda: random_model(
        tiny_config(
            "llama",
            **{**DECODER, "intermediate_size": 2400, "num_hidden_layers": 1},
            max_position_embeddings=64,
            tie_word_embeddings=False,
        ),
        0.9,
    ).bfloat16(),
}
Tensors = dict[str, torch.Tensor]


def unsigned(folder: Path) -> dict[str, Any]:
    """The description of a compiled model without its digests: other checks find what tests change."""
    described: dict[str, Any] = json.loads((folder / "compiled.json").read_text())
    described.pop("digests", None)
    return described


@functools.cache
def _saved(name: str) -> tuple[dict[str, Any], Tensors]:
    with tempfile.TemporaryDirectory() as folder:
        hf_sparse.save_compiled(hf_sparse.compile(MODELS[name]()), folder)
        described = unsigned(Path(folder))
        tensors = load_file(Path(folder) / "compiled.safetensors")
        return described, {name: tensor.clone() for name, tensor in tensors.items()}


def saved(name: str) -> tuple[dict[str, Any], Tensors]:
    """Description and tensors of a compiled model, to be changed."""
    described, tensors = _saved(name)
    return copy.deepcopy(described), {name: tensor.clone() for name, tensor in tensors.items()}


def as_old(described: dict[str, Any], tensors: Tensors) -> None:
    """Give them the layout before today's: no id, and other types in the description."""
    described.pop("id", None)
    tensors.pop("id", None)
    sizes = iter(described["layout"][4:])
    tables = [{str(height): next(sizes) for height in (1, 2, 4)} for _ in range(3)]
    described["layout"] = [3, *described["layout"][1:4], *tables]
    described["types"] = old_types(tensors) | dict.fromkeys(described["tied"], "torch.float32")


def old_types(tensors: Tensors) -> dict[str, str]:
    """Types as old descriptions tell them: of what is outside of the blocks."""
    outside = {name.split(".", 1)[-1]: str(t.dtype) for name, t in tensors.items()}
    return {name: told for name, told in outside.items() if f"stack.{name}" not in tensors}


def write(folder: Path, described: Any, tensors: Tensors, described_too: bool = True) -> Path:
    """A compiled model of these; `described_too`: the description tells the tensors' sizes."""
    folder.mkdir(exist_ok=True)
    if described_too and described["layout"][0] == 3:
        described["types"] |= old_types(tensors)
    elif described_too:
        described["types"] = {n: [str(t.dtype), list(t.shape)] for n, t in tensors.items()}
    save_file({n: t.clone() for n, t in tensors.items()}, folder / "compiled.safetensors")
    (folder / "compiled.json").write_text(json.dumps(described))
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of a few tokens, and of one more behind them."""
    ids = torch.arange(18).view(2, 9)
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=True)
        second = model(input_ids=ids[:, :1], past_key_values=first.past_key_values)
    return torch.cat([first.logits, second.logits], dim=1)


def in_a_child(run: Callable[[], None]) -> int:
    """Run something in a process of its own; its exit status, negative if a signal ended it."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
