"""What is fuzzed: an honest folder, and how its files are read."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, logging

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.checkpoint.digests import digest_of
from hf_sparse.checkpoint.index import read_index
from hf_sparse.checkpoint.reading import restore_state_dict
from hf_sparse.effort import work
from hf_sparse.effort.plan import SparsifyPlan
from tests.support.few_bits import INT4, quantised
from tests.support.tiny_models import tiny_batches, tiny_model

GOLDEN = Path(__file__).parents[1] / "golden"
REFUSED = (ValueError, OSError)  # FormatError is a ValueError


@dataclass(frozen=True)
class Subject:
    """A kind of files.

    Attributes:
        make: writes an honest folder.
        read: reads a folder, and gives what was found as text.
        refuses: what reading may raise.
        fast: a reading takes milliseconds at most: guided fuzzing pays.
        sealed: names, as globs, of files that have a digest of their content: a change must be found.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], str]
    refuses: tuple[type[Exception], ...] = REFUSED
    fast: bool = False
    sealed: tuple[str, ...] = ()


def _copied(source: Path, folder: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, folder, dirs_exist_ok=True)
    else:
        shutil.copy(source, folder / source.name)


def _digest(tensors: dict[str, Tensor]) -> str:
    return digest_of(tensors)


def _restored(folder: Path) -> str:
    """Parts of compressed tensors, restored as `load_state_dict` does."""
    (file,) = folder.iterdir()
    try:
        tensors = load(file.read_bytes())
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    found = restore_state_dict(tensors, {"w": (4, 8)}, {"w": False})
    return _digest({name: tensor for name, tensor in found.items() if not tensor.is_meta})


def _loaded(folder: Path, auto: Any = AutoModelForCausalLM) -> str:
    return _digest(auto.from_pretrained(folder).state_dict())


def _inspected(folder: Path) -> str:
    found = hf_sparse.inspect_checkpoint(folder)
    return hashlib.sha256(f"{found}{found.report}".encode("utf-8", "replace")).hexdigest()


@cache
def _base() -> Any:
    model = tiny_model("llama", num_hidden_layers=1)
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    return model


def _make_adapter(folder: Path, kind: str) -> None:
    import peft

    config: Any = peft.LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 3}
    )
    if kind == "shira":
        config = peft.ShiraConfig(r=1, target_modules=["q_proj"])
    adapted = hf_sparse.get_peft_model(_base(), config)
    adapted.save_pretrained(folder)
    adapted.unload()


def _adapted(folder: Path) -> str:
    model = hf_sparse.load_adapter(_base(), folder)
    try:
        return _digest(dict(model.state_dict()))
    finally:
        model.unload()


def _save(folder: Path, config: SparsityConfig, **options: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    hf_sparse.prune_(model, SparsityConfig(config.pattern, config.sparsity), "magnitude")
    hf_sparse.save_pretrained(model, folder, config, **options)


def _make_plan(folder: Path) -> None:
    batches = tiny_batches("llama", length=48)
    plan = hf_sparse.plan_sparsify(tiny_model("llama"), SparsityConfig("2:4"), batches)
    plan.save(folder / "recipe.json")


def _read_stage(folder: Path) -> str:
    tensors, told = work.read(folder / "stage-1.safetensors")
    return _digest(tensors) + str(told)


def _make_stage(folder: Path) -> None:
    tensors = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.zeros(5)}
    work.write(folder / "stage-1.safetensors", tensors, {"stage": 1, "names": ["a", "b"]})


def _make_legacy(folder: Path) -> None:
    from tests.checkpoint.test_legacy import sparse_llama, write_legacy

    folder.rmdir()
    write_legacy(folder, sparse_llama())


def _converted(folder: Path) -> str:
    output = folder.with_name(folder.name + "-converted")
    try:
        return _loaded(hf_sparse.convert_legacy(folder, output, overwrite=True))
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _compiled(folder: Path) -> str:
    model = hf_sparse.load_compiled(folder)
    with torch.no_grad():
        found = model(input_ids=torch.arange(6).view(2, 3))
    first = found.logits if "logits" in found else found.last_hidden_state
    return str(first.double().sum().item())


def _save_compiled(folder: Path) -> None:
    hf_sparse.save_compiled(hf_sparse.compile(_base()), folder)


SUBJECTS: dict[str, Subject] = {
    **{
        f"tensors-{file.stem}": Subject(partial(_copied, file), _restored, fast=True)
        for file in sorted([*GOLDEN.glob("*.safetensors"), *(GOLDEN / "codes").iterdir()])
    },
    "index": Subject(
        lambda folder: _copied(GOLDEN / "old/llama-sharded/model.safetensors.index.json", folder),
        lambda folder: str(read_index(folder / "model.safetensors.index.json")),
        fast=True,
    ),
    "recipe": Subject(
        _make_plan, lambda folder: str(SparsifyPlan.load(folder / "recipe.json")), fast=True
    ),
    "stage": Subject(_make_stage, _read_stage, fast=True),
    **{
        f"old-{name}": Subject(partial(_copied, GOLDEN / "old" / name), _loaded)
        for name in ("gpt2-gap8", "llama-sharded", "mistral-shrunk", "opt-block")
    },
    "old-bert-nm": Subject(
        partial(_copied, GOLDEN / "old" / "bert-nm"), partial(_loaded, auto=AutoModel)
    ),
    "checkpoint-rice": Subject(
        lambda folder: _save(folder, SparsityConfig("unstructured", 0.9, format="rice")),
        _loaded,
        sealed=("model.safetensors",),
    ),
    "checkpoint-codes": Subject(
        lambda folder: (hf_sparse.save_pretrained(quantised(), folder, INT4), None)[1],
        _loaded,
        sealed=("model.safetensors",),
    ),
    "checkpoint-shards": Subject(
        lambda folder: _save(folder, SparsityConfig("2:4"), max_shard_size="20KB"),
        _loaded,
        sealed=("model-*.safetensors",),
    ),
    "inspect": Subject(lambda folder: _save(folder, SparsityConfig("2:4")), _inspected),
    "adapter-lora": Subject(partial(_make_adapter, kind="lora"), _adapted),
    "adapter-shira": Subject(partial(_make_adapter, kind="shira"), _adapted),
    "legacy": Subject(_make_legacy, _converted),
    "compiled": Subject(
        _save_compiled, _compiled, sealed=("compiled.safetensors", "compiled.json")
    ),
    **{
        f"old-compiled-{name}": Subject(
            partial(_copied, GOLDEN / f"old/compiled-{name}"), _compiled
        )
        for name in ("gpt2", "llama")
    },
}


def be_quiet() -> None:
    """Let transformers tell nothing in this process, of the many things that it would tell."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
